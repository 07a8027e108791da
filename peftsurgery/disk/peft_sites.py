"""Which site takes a group of parameters, told from their names and shapes alone.

The method says where it repeats a size of the site, and the tensors say how large that size is.
"""

from __future__ import annotations

import re
from dataclasses import replace

from peftsurgery.method import Method, Params
from peftsurgery.site import Kind, Layout, Site

SIZES = (1_000_003, 1_000_033, 1_000_037, 1_000_039, 1_000_081)
"""The sizes of a probing site: primes that no hyper-parameter equals."""
PROBES = ((Kind.LINEAR, 2), (Kind.EMBEDDING, 2), (Kind.CONV, 3), (Kind.CONV, 4), (Kind.CONV, 5))


def probes(name: str, method: Method, layout: Layout = Layout.OUT_IN) -> list[Site]:
    """Sites of every kind that the method can stand at, with sizes that are told apart."""
    layouts = {Kind.LINEAR: layout, Kind.EMBEDDING: Layout.IN_OUT, Kind.CONV: Layout.OUT_IN}
    return [Site(name, kind, SIZES[:dims], layouts[kind]) for kind, dims in PROBES if kind in method.kinds]


def site_of(name: str, method: Method, layout: Layout, params: Params) -> Site:
    """The site that takes these parameters; a size that the method never repeats is 1."""

    def likeness(probe: Site) -> tuple[int, int]:
        shapes = method.shapes(probe)
        shared = shapes.keys() & params.keys()
        return len(shared), sum(len(shapes[word]) == params[word].ndim for word in shared)

    probe = max(probes(name, method, layout), key=likeness)
    sizes = {
        marked: size
        for word, shape in method.shapes(probe).items()
        for marked, size in zip(shape, params[word].shape if word in params else (), strict=False)
    }
    return replace(probe, shape=tuple(sizes.get(size, 1) for size in probe.shape))


def natural(name: str) -> list[str | int]:
    """A sorting key that puts `layer.2` before `layer.10`."""
    return [
        int(part) if part.isascii() and part.isdecimal() else part for part in re.split(r"([0-9]+)", name)
    ]
