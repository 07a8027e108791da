"""The law of tiles: however a fold is cut and shared among threads, its bits are those of the formula on the whole."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from peftsurgery import fold as folding
from peftsurgery.adapter import Adapter
from peftsurgery.errors import NonFiniteWeight
from peftsurgery.fold import fold_tile, folded, tiles, touches
from peftsurgery.method import Method
from peftsurgery.planning import Plan, Step
from peftsurgery.site import Kind, Layout, Site
from peftsurgery.tally import Tally

SITES = (
    Site("linear", Kind.LINEAR, (301, 130)),
    Site("wide", Kind.LINEAR, (48, 4096)),
    Site("conv1d", Kind.LINEAR, (144, 257), Layout.IN_OUT),
    Site("embedding", Kind.EMBEDDING, (1003, 40), Layout.IN_OUT),
    Site("conv", Kind.CONV, (130, 18, 3, 3)),
    Site("line", Kind.CONV, (100, 33, 5)),
    Site("tiny", Kind.LINEAR, (3, 2)),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TILES = (1, 1 << 13, 1 << 30)
"""Elements of a tile: the narrowest, something between, all of it."""


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def given(site: Site, method: Method, seed: int) -> Adapter:
    chance = torch.Generator().manual_seed(seed)
    params = {name: torch.randn(shape, generator=chance) for name, shape in method.shapes(site).items()}
    head = torch.randn(site.shape[0], generator=chance)
    return Adapter(Plan((Step(site, method),)), {site.name: params}, replaced={site.bias: head})


def base(site: Site, dtype: torch.dtype) -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(9)
    return {
        name: torch.randn(shape, generator=chance).to(dtype)
        for name, shape in ((site.weight, site.shape), (site.bias, site.shape[:1]))
    }


def whole(tensors: dict[str, Tensor], *adapters: Adapter) -> dict[str, Tensor]:
    """The definition: every change applied to the whole tensor by one thread, one rounding."""
    torch.set_num_threads(1)
    found = {}
    for name, changes in touches(*adapters).items():
        value = tensors[name].to(torch.promote_types(tensors[name].dtype, torch.float32))
        for change in changes:
            value = change(value)
        found[name] = value.to(tensors[name].dtype)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("site", SITES, ids=lambda site: site.name)
def test_neither_tiles_nor_threads_change_a_bit(
    site: Site, dtype: torch.dtype, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, adapters = base(site, dtype), [given(site, method, seed) for seed in (1, 2)]
    expected = whole(tensors, *adapters)
    for size in TILES:
        monkeypatch.setitem(folding.TILE, "cpu", size)
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found = dict(folded(tensors.items(), *adapters))
            assert torch.get_num_threads() == threads
            assert all(torch.equal(found[name], expected[name]) for name in expected), (size, threads)


@pytest.mark.parametrize("site", SITES, ids=lambda site: site.name)
def test_tiles_lie_side_by_side(site: Site, method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    (changes,) = (found for name, found in touches(given(site, method, 0)).items() if name == site.weight)
    for size in TILES:
        monkeypatch.setitem(folding.TILE, "cpu", size)
        grid = tiles(changes, site.shape)
        assert [rows.start for rows in grid] == [0, *(rows.stop for rows in grid[:-1])]
        assert grid[-1].stop == site.shape[0]
        assert len(grid) == 1 or min(rows.stop - rows.start for rows in grid) >= folding.NARROWEST


def test_a_change_travels(method: Method) -> None:
    """To another process, with the bits that it has here."""
    site = SITES[0]
    changes = touches(given(site, method, 0))[site.weight]
    tensor = base(site, torch.float32)[site.weight]
    rows = tiles(changes, site.shape)[0]
    sent = pickle.loads(pickle.dumps(changes))
    outs = [torch.empty_like(tensor[rows]) for _ in range(2)]
    for out, some in zip(outs, (changes, sent), strict=True):
        fold_tile(site.weight, some, tensor[rows], rows, out)
    assert torch.equal(*outs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_tallies_add_up_to_what_happened(dtype: torch.dtype, stored: torch.dtype, method: Method) -> None:
    site, found = SITES[0], Tally()
    changes = touches(given(site, method, 0))[site.weight]
    tensor = base(site, dtype)[site.weight]
    out = torch.empty(site.shape, dtype=stored)
    for rows in tiles(changes, site.shape):
        found += fold_tile(site.weight, changes, tensor[rows], rows, out[rows], measure=True)
    wide = torch.promote_types(dtype, torch.float32)
    exact = changes[0](tensor.to(wide))
    assert found.numel == tensor.numel()
    assert found.changed == int((out != tensor.to(stored)).sum())
    assert found.norm == pytest.approx(float((exact - tensor.to(wide)).double().norm()), rel=1e-5)
    off = float((out.to(wide) - exact).double().norm())
    assert found.lost == pytest.approx(off / found.norm, rel=1e-4)


def test_inference_mode_is_no_hindrance(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(folding.TILE, "cpu", 1)
    tensors, one = base(SITES[0], torch.float32), given(SITES[0], method, 0)
    expected = whole(tensors, one)
    with torch.inference_mode():
        assert torch.equal(dict(folded(tensors.items(), one))["linear.weight"], expected["linear.weight"])


def test_a_tile_that_overflows_is_named(method: Method) -> None:
    site = SITES[0]
    one = given(site, method, 0)
    params = {site.name: {name: p.clone() for name, p in one.params[site.name].items()}}
    for p in params[site.name].values():
        p[-1] = 1e4  # the last rows of B, and of A
    tensors = base(site, torch.float16)
    with pytest.raises(NonFiniteWeight, match=r"'linear\.weight' gave NaN or infinite values in float16"):
        dict(folded(tensors.items(), replace(one, params=params)))
