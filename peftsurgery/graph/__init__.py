"""As ONNX: tracing, the graph's weights and sites, merging there, running and comparing."""
