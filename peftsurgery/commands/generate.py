"""generate: a text from an export, as a server would run it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from peftsurgery.commands.report import Report
from peftsurgery.errors import AdapterError, PlanError
from peftsurgery.events import Event, Listener, ignore

if TYPE_CHECKING:
    from peftsurgery.graph.generation import Decoder
    from peftsurgery.graph.prefixes import Prefix
    from peftsurgery.graph.sampling import Sampling

UNFINISHED = "\ufffd"
"""What a tokenizer gives for the first bytes of a character whose last ones are still to come."""


def generate(
    model: str | Path,
    prompts: str | Sequence[str],
    *,
    prefixes: Sequence[str | Path] = (),
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    providers: Sequence[str] = (),
    threads: int = 0,
    listen: Listener = ignore,
) -> Report:
    """Go on with texts, all in one batch, with the keys and values of what was read kept on the device.

    An encoder-decoder reads the texts and writes what follows from them, from the token on that its configuration
    names. The text of a single prompt comes piece by piece too, as the names of events.

    Args:
        model: the directory of a decoder's or an encoder-decoder's export.
        prefixes: a soft prompt for each prompt, or one for all: files that `export-onnx --prefix file` wrote; `none`
            for a row without.
        max_new_tokens, temperature, top_k, top_p, seed: see `peftsurgery.graph.sampling.Sampling`; greedy at first.
        providers: where to run, best first: `cuda`, `cpu`.
        threads: that one operation may use; 0 lets ONNX Runtime choose.

    Raises:
        ExportError: the directory holds no graph with a cache, or a provider does not work.
        PlanError, AdapterError: the prefixes are not as many as the prompts; one is not there; a prompt is empty.
    """
    from peftsurgery.graph.generation import Decoder
    from peftsurgery.graph.sampling import Sampling

    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    how = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    read = [_prefix(path) for path in _spread(prefixes, len(texts))]
    decoder = Decoder(model, providers or None, threads=threads)
    rows = [_tokens(decoder, text) for text in texts]
    start = perf_counter()
    written = [*_written(decoder, rows, how, read, listen)]
    return _report(model, texts, written, perf_counter() - start, decoder)


def _spread(prefixes: Sequence[str | Path], count: int) -> Sequence[str | Path]:
    if count == 0:
        raise PlanError("There is no text to go on with. Give one: `--prompt 'Once upon a time'`.")
    if len(prefixes) not in (0, 1, count):
        raise PlanError(
            f"There are {count} prompts and {len(prefixes)} prefixes. Give one for each, or one for all."
        )
    return list(prefixes) * count if len(prefixes) == 1 else prefixes


def _tokens(decoder: Decoder, text: str) -> list[int]:
    found: list[int] = decoder.tokenizer(text)["input_ids"]
    if not found:
        raise PlanError(
            f"The prompt {text!r} has no tokens. Give one with a word: `--prompt 'Once upon a time'`."
        )
    return found


def _prefix(path: str | Path) -> Prefix | None:
    if str(path) == "none":
        return None
    try:
        return {name: tensor.float().numpy() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"{path} is no file of keys and values: {error}. "
            "Write one: `peftsurgery export-onnx MODEL --adapter PROMPT --prefix file -o OUT`."
        ) from error


def _written(
    decoder: Decoder, rows: Sequence[Sequence[int]], how: Sampling, prefixes: Sequence[Any], listen: Listener
) -> Iterator[list[int]]:
    """The new tokens of every text."""
    tokenizer = decoder.tokenizer
    found: list[list[int]] = [[] for _ in rows]
    said, total = "", how.max_new_tokens
    for done, tokens in enumerate(decoder.steps(rows, how, prefixes=prefixes), 1):
        for row, token in zip(found, tokens.tolist(), strict=True):
            row.append(token)
        text = tokenizer.decode(found[0], skip_special_tokens=True) if len(rows) == 1 else ""
        if done < total and not text.endswith(UNFINISHED):
            listen(Event("generate", text[len(said) :], done, total))
            said = text
    listen(Event("generate", text[len(said) :], total, total))
    yield from (decoder.ended(row) for row in found)


def _report(
    model: str | Path, texts: Sequence[str], written: Sequence[list[int]], seconds: float, decoder: Decoder
) -> Report:
    tokenizer, count = decoder.tokenizer, sum(map(len, written))
    news = [tokenizer.decode(row, skip_special_tokens=True) for row in written]
    facts = {
        "model": str(model),
        "provider": decoder.session.provider,
        "texts": [
            {"prompt": text, "text": new, "tokens": row}
            for text, new, row in zip(texts, news, written, strict=True)
        ],
        "tokens": count,
        "seconds": round(seconds, 4),
        "unheeded": list(decoder.rules.unheeded),
    }
    table = [("prompt", "text"), *zip(texts, news, strict=True)] if len(texts) > 1 else ()
    return Report(
        "generate", f"{count} tokens in {seconds:.2f} s, {count / seconds:.0f} tokens/s.", facts, table
    )
