#!/usr/bin/env bash
# A real adapter on a real model, from checkpoint to a verified ONNX model. `make demo` runs this.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export HF_HUB_OFFLINE=1
BASE=$(python -m fixtures.minilm)   # all-MiniLM-L6-v2, installed with `make venv`
LORA=fixtures/minilm_lora           # a LoRA that tells complaints from other sentences
OUT=build/demo

BOLD='' DIM='' PLAIN=''
if [ -t 1 ]; then BOLD=$'\033[1m' DIM=$'\033[2m' PLAIN=$'\033[0m'; fi

say() { printf '\n%s\n' "$BOLD$1$PLAIN"; }

# Print a command as one would type it, then run it.
run() {
    local word line='$'
    for word in "$@"; do
        case $word in
            *' '*) word="'$word'" ;;
            "$BASE") word='$BASE' ;;
        esac
        line+=" $word"
    done
    printf '%s\n' "$DIM$line$PLAIN"
    "$@"
}

rm -rf "$OUT"
mkdir -p "$OUT"
printf '%s\n' "${DIM}BASE=$BASE$PLAIN"

say '1. Look at the adapter, and at the places in the model that it names'
run peftsurgery inspect "$LORA"
run peftsurgery inspect "$BASE" --targets query,value

say '2. Merge it: W0 + s·B·A, in float32, rounded once'
run peftsurgery merge "$BASE" "$LORA" -o "$OUT/merged"

say '3. Export the merged model to ONNX'
run peftsurgery export-onnx "$OUT/merged" -o "$OUT/onnx"

say '4. Verify the ONNX model: against the merged model, and against the base with the adapter unmerged'
run peftsurgery verify "$OUT/onnx" --against "$OUT/merged"
run peftsurgery verify "$OUT/onnx" --against "$BASE" --adapter "$LORA"

say '5. Classify, with ONNX Runtime alone'
run python examples/classify.py "$OUT/onnx" --file examples/sentences.txt --labels fine,complaint \
    --golden "$LORA/golden.npz"

say 'Done. What is where, and what next'
cat <<END
  $OUT/merged   a checkpoint for AutoModelForSequenceClassification.from_pretrained
  $OUT/onnx     model.onnx with its tokenizer, and peftsurgery.json, the record of the comparison

  Classify your own:     .venv/bin/python examples/classify.py $OUT/onnx --labels fine,complaint 'Your sentence.'
  See the model:         open $OUT/onnx/model.onnx in a viewer such as netron
  Merge your own:        .venv/bin/peftsurgery merge MODEL ADAPTER -o OUT
  Every command:         .venv/bin/peftsurgery --help
END
