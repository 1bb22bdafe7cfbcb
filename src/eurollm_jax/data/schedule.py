"""Schedule: which source each row of a run is of, and how many rows of each source came before it, in closed form.

A stage deals its rows out by a binary tree of splits whose leaves are the sources. A node that has been given c rows
passes (c * part + whole // 2) // whole of them, the half-rounded floor of its left child's exact part, to that child
and the rest to the other. Both counts grow by 0 or 1 as c does, so a row's way down the tree follows from c alone,
and so does the way back up. The tree is Huffman's, for two reasons: a row passes about as many splits as the entropy
of the shares has bits, and weights grow at least like the Fibonacci numbers on the way from leaf to root, so the half
row of each rounding adds up to less than `DEVIATION` rows however many sources there are.
"""

import heapq
import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int64

SHARE_SUM = 1 << 30
"""What the integer shares of a stage sum to. Products of two shares then stay below 2**60, so int64 arithmetic is
exact."""

LAST_ROW = 1 << 60
"""Row numbers stay below this."""

DEVIATION = 1.68
"""Within a stage, a source's rows among the first k are within this many of its exact share of k (half the sum of the
reciprocals of the Fibonacci numbers, for the roundings between a Huffman leaf and the root)."""


@dataclass(frozen=True, slots=True)
class Stage:
    """From global row `start` on, source i gets `shares[i] / SHARE_SUM` of the rows."""

    start: int
    shares: tuple[int, ...]


@dataclass(frozen=True)
class Schedule:
    """Which source row k is of, for every k from 0 on; the last stage goes on for ever.

    `names` are the sources of the store, sorted; "source" is an index into them everywhere. A source may have no share.
    """

    names: tuple[str, ...]
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        starts = [stage.start for stage in self.stages]
        if not starts or starts[0] != 0 or any(a >= b for a, b in itertools.pairwise(starts)):
            raise ValueError(f"stages must start at row 0 and increase, not {starts}")
        for stage in self.stages:
            if len(stage.shares) != len(self.names) or min(stage.shares) < 0 or sum(stage.shares) != SHARE_SUM:
                raise ValueError(f"the shares of each stage must be {len(self.names)} and sum to {SHARE_SUM}")

    def describe(self) -> dict:
        """What the dealing of rows depends on, as JSON-able values."""
        return {
            "stages": [
                {"start": s.start, "shares": {n: share for n, share in zip(self.names, s.shares, strict=True) if share}}
                for s in self.stages
            ],
            "share_sum": SHARE_SUM,
        }

    @cached_property
    def scheduled(self) -> tuple[int, ...]:
        """The sources that have a share in any stage."""
        return tuple(i for i in range(len(self.names)) if any(stage.shares[i] for stage in self.stages))

    @cached_property
    def _trees(self) -> tuple["_SplitTree", ...]:
        return tuple(_SplitTree(stage.shares) for stage in self.stages)

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.array([stage.start for stage in self.stages], np.int64)

    @cached_property
    def _before(self) -> np.ndarray:
        """int64 [stages, sources]: rows of each source before the stage starts."""
        before = np.zeros((len(self.stages), len(self.names)), np.int64)
        for i in range(1, len(self.stages)):
            rows = self.stages[i].start - self.stages[i - 1].start
            before[i] = before[i - 1] + self._trees[i - 1].counts(rows)
        return before

    def counts(self, k: int) -> Int64[np.ndarray, " sources"]:
        """Rows of each source among the first k rows."""
        if not 0 <= k <= LAST_ROW:
            raise ValueError(f"row {k} is not between 0 and {LAST_ROW}")
        stage = max(int(np.searchsorted(self._starts, k, side="right")) - 1, 0)
        return self._before[stage] + self._trees[stage].counts(k - self.stages[stage].start)

    def locate(self, k: Int64[np.ndarray, " n"]) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Source of each global row, and how many rows of that source came before it."""
        k = np.asarray(k, np.int64)
        if k.size and not (k.min() >= 0 and k.max() < LAST_ROW):
            raise ValueError(f"rows {k.min()} to {k.max()} are not all between 0 and {LAST_ROW}")
        stage = np.searchsorted(self._starts, k, side="right") - 1
        source, j = np.empty_like(k), np.empty_like(k)
        for s in np.unique(stage):
            here = stage == s
            source[here], rank = self._trees[s].locate(k[here] - self._starts[s])
            j[here] = self._before[s, source[here]] + rank
        return source, j

    def index(self, source: Int64[np.ndarray, " n"], j: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The global row that is row j of the source: the inverse of `locate`. -1 where the source's share ends
        before j."""
        source, j = np.broadcast_arrays(np.asarray(source, np.int64), np.asarray(j, np.int64))
        if j.size and j.min() < 0:
            raise ValueError(f"row {j.min()} of a source is negative")
        # The last stage that starts with at most j rows of the source behind it.
        stage = (self._before[:, source] <= j).sum(axis=0) - 1
        k = np.full(j.shape, -1, np.int64)
        for s in np.unique(stage):
            here = (stage == s) & (np.array(self.stages[s].shares)[source] > 0)
            rank = j[here] - self._before[s, source[here]]
            k[here] = self._starts[s] + self._trees[s].index(source[here], rank)
        return k


class _SplitTree:
    """The splits of one stage. Nodes 0..n-1 are the sources with a share, node 2n-2 is the root, and a parent's
    number is greater than its children's."""

    def __init__(self, shares: tuple[int, ...]) -> None:
        leaf_source = [i for i, share in enumerate(shares) if share]
        leaves, nodes = len(leaf_source), 2 * len(leaf_source) - 1
        weight = [shares[i] for i in leaf_source] + [0] * (leaves - 1)
        left, right, parent, offset = ([-1] * nodes for _ in range(4))
        heap = [(weight[node], node) for node in range(leaves)]  # equal weights: the node that was made first
        heapq.heapify(heap)
        for node in range(leaves, nodes):
            (light, left[node]), (heavy, right[node]) = heapq.heappop(heap), heapq.heappop(heap)
            whole = weight[node] = light + heavy
            for child, rounding in ((left[node], whole // 2), (right[node], whole - 1 - whole // 2)):
                parent[child], offset[child] = node, rounding
            heapq.heappush(heap, (whole, node))
        self.leaf_source = np.array(leaf_source, np.int64)
        self.leaf_of = np.full(len(shares), -1, np.int64)
        self.leaf_of[self.leaf_source] = np.arange(leaves)
        self.weight, self.parent, self.offset = (np.array(x, np.int64) for x in (weight, parent, offset))
        self.left, self.right = np.array(left, np.int64), np.array(right, np.int64)

    def counts(self, k: int) -> np.ndarray:
        """int64 [sources]: rows of each source among the first k of the stage."""
        nodes, leaves = len(self.weight), len(self.leaf_source)
        rows = [0] * (nodes - 1) + [k]
        for node in range(nodes - 1, leaves - 1, -1):
            left, right, whole = int(self.left[node]), int(self.right[node]), int(self.weight[node])
            rows[left] = (rows[node] * int(self.weight[left]) + whole // 2) // whole
            rows[right] = rows[node] - rows[left]
        counts = np.zeros(len(self.leaf_of), np.int64)
        counts[self.leaf_source] = rows[:leaves]
        return counts

    def locate(self, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of each row of the stage, and the rows of that source before it within the stage."""
        leaves, root = len(self.leaf_source), len(self.weight) - 1
        node, rank = np.full(k.shape, root, np.int64), k.astype(np.int64)
        inner = np.flatnonzero(node >= leaves)
        while inner.size:
            at, rows = node[inner], rank[inner]
            left, whole = self.left[at], self.weight[at]
            part = self.weight[left]
            # (rows * part + whole // 2) // whole, with the product split so that it cannot overflow.
            quotient, remainder = np.divmod(rows, whole)
            carried, rest = np.divmod(remainder * part + whole // 2, whole)
            to_left = quotient * part + carried
            goes_left = rest + part >= whole  # the left child's count grows with this very row
            at = np.where(goes_left, left, self.right[at])
            node[inner], rank[inner] = at, np.where(goes_left, to_left, rows - to_left)
            inner = inner[at >= leaves]
        return self.leaf_source[node], rank

    def index(self, source: np.ndarray, rank: np.ndarray) -> np.ndarray:
        """The row of the stage that is the source's row `rank` within the stage."""
        root = len(self.weight) - 1
        node, k = self.leaf_of[source], rank.astype(np.int64)
        if np.any(k * (self.weight[root] / self.weight[node]) >= LAST_ROW):
            raise ValueError(f"a row of a source lies beyond global row {LAST_ROW}")
        inner = np.flatnonzero(node != root)
        while inner.size:
            at = node[inner]
            parent, part = self.parent[at], self.weight[at]
            whole = self.weight[parent]
            # A child has (c * part + offset) // whole of its parent's first c rows; the first c that gives it rank +
            # 1 is ceil(((rank + 1) * whole - offset) / part), again without a large product.
            quotient, remainder = np.divmod(k[inner] + 1, part)
            k[inner] = quotient * whole - (self.offset[at] - remainder * whole) // part - 1
            node[inner] = parent
            inner = inner[parent != root]
        return k
