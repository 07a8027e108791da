"""Sites by what reads them, in graphs that nobody here wrote."""

from __future__ import annotations

import numpy as np

from peftsurgery.graph.sites import alias, sites, ties
from peftsurgery.site import Kind, Layout, Site
from tests.units.graphs import graph, node, noise


def test_every_reader_makes_its_kind_of_site() -> None:
    model = graph(
        [
            node("MatMul", "x in_out.weight", "a"),
            node("Transpose", "out_in.weight", "t", perm=[1, 0]),
            node("MatMul", "x t", "b"),
            node("Gemm", "x gemm_b.weight", "c", transB=1),
            node("Gemm", "x gemm.weight", "d"),
            node("Gather", "table.weight ids", "e"),
            node("Gather", "columns.weight ids", "f", axis=1),
            node("Mul", "x norm.weight", "g"),
            node("MatMul", "x free", "h"),
            node("Unsqueeze", "x axis", "image"),
            node("Conv", "image conv.weight", "i"),
            node("Conv", "image grouped.weight", "j", group=2),
        ],
        {
            "in_out.weight": noise(4, 3),
            "out_in.weight": noise(3, 4),
            "gemm_b.weight": noise(5, 4),
            "gemm.weight": noise(4, 5),
            "table.weight": noise(3, 6),
            "columns.weight": noise(6, 3),
            "norm.weight": noise(4),
            "free": noise(4, 2),
            "axis": np.int64([1]),
            "conv.weight": noise(2, 1, 3),
            "grouped.weight": noise(2, 1, 3),
            "unread.weight": noise(2, 2),
        },
        outputs=("a", "b", "c", "d", "e", "f", "g", "h", "i", "j"),
    )
    linear, embedding = Kind.LINEAR, Kind.EMBEDDING
    assert sites(model) == [
        Site("in_out", linear, (4, 3), Layout.IN_OUT),
        Site("out_in", linear, (3, 4), Layout.OUT_IN),
        Site("gemm_b", linear, (5, 4), Layout.OUT_IN),
        Site("gemm", linear, (4, 5), Layout.IN_OUT),
        Site("table", embedding, (3, 6), Layout.IN_OUT),
        Site("columns", Kind.OTHER, (6, 3)),
        Site("norm", Kind.OTHER, (4,)),
        Site("conv", Kind.CONV, (2, 1, 3)),
        Site("grouped", Kind.OTHER, (2, 1, 3)),
    ]
    assert ties(model) == []


def test_a_tied_weight_is_one_site_and_a_tie() -> None:
    model = graph(
        [
            node("Gather", "e.weight ids", "rows"),
            node("Transpose", "e.weight", "t", perm=[1, 0]),
            node("MatMul", "rows t", "y"),
        ],
        {"e.weight": noise(3, 4)},
    )
    assert sites(model) == [Site("e", Kind.EMBEDDING, (3, 4), Layout.IN_OUT)]
    assert ties(model) == [("e.weight", "Gather_rows", "Transpose_t")]
    alias(model, {"e.weight": ("head.weight",)})
    assert ties(model) == [("e.weight", "head.weight")]


def test_batches_of_matrices_and_integers_are_out_of_reach() -> None:
    model = graph(
        [
            node("MatMul", "x experts.weight", "a"),
            node("Cast", "packed.weight", "wide", to=1),
            node("MatMul", "x wide", "b"),
        ],
        {"experts.weight": noise(2, 4, 3), "packed.weight": np.ones((4, 3), np.int8)},
        outputs=("a", "b"),
    )
    assert [site.kind for site in sites(model)] == [Kind.OTHER, Kind.OTHER]
