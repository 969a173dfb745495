"""Which annotations of a source become rows: their datasets, caps, one id for each, and the split of every picture.

Everything streams. The memory holds the ids of the wanted datasets, to find what comes twice, and the places of the
rows that a draw keeps.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Generic, TypeVar

from sif_ray.config import GenerateConfig, SelectConfig
from sif_ray.datagen.annotations import Annotation, Source

TRAIN, HELDOUT = "train", "heldout"

Item = TypeVar("Item", int, str)


def select(source: Source, config: GenerateConfig) -> Iterator[Annotation]:
    """The annotations that become rows of the dataset, in the order of the source.

    What comes with an error of its own takes no place of another: it passes the caps, so that its reason is counted.
    The order "first" ends with the last row that is kept; "stratified" with a cap reads the source twice.
    Raises `ConfigError` as `source.annotations`.
    """
    rules = config.select
    if rules.order == "first":
        chosen = _first(_wanted(source, rules), rules)
    elif rules.max_rows or rules.max_per_dataset:
        chosen = _drawn(source, rules, config.seed)
    else:
        chosen = _wanted(source, rules)
    for annotation in chosen:
        yield annotation if annotation.split else replace(annotation, split=_split(annotation.image, config))


def stratified(ids_by_stratum: Mapping[str, Iterable[str]], num: int, seed: int) -> list[str]:
    """At most `num` ids, sorted, with even shares of the strata; what a small stratum lacks the others make up for.

    An id is drawn by its hash and that of the seed, so the order of strata and ids does not matter.
    """
    draw = _Draw[str](num, num, seed)
    for stratum, ids in ids_by_stratum.items():
        for sample_id in ids:
            draw.offer(stratum, sample_id, sample_id)
    return sorted(draw.items())


def even_shares(available: Mapping[str, int], num: int, seed: int) -> dict[str, int]:
    """How many of each stratum make up `num`: equal numbers, or all of a stratum that has fewer.

    What cannot be divided goes, one each, to larger strata drawn by hash.
    """
    counts = sorted(available.values())
    level, left = max(counts, default=0), num
    for place, count in enumerate(counts):
        share = left // (len(counts) - place)
        if share < count:
            level = share
            break
        left -= count
    shares = {stratum: min(count, level) for stratum, count in available.items()}
    larger = sorted((name for name, count in available.items() if count > level), key=lambda name: _hash(seed, name))
    for stratum in larger[: num - sum(shares.values())]:
        shares[stratum] += 1
    return shares


def unique_ids(annotations: Iterable[Annotation]) -> Iterator[Annotation]:
    """The annotations, where the second one of an id is called `<id>#2` and has the error `id_duplicate`."""
    seen: set[str] = set()
    for annotation in annotations:
        sample_id, number = annotation.sample_id, 1
        while sample_id in seen:
            number += 1
            sample_id = f"{annotation.sample_id}#{number}"
        seen.add(sample_id)
        if number > 1:
            annotation = replace(annotation, sample_id=sample_id, error=annotation.error or "id_duplicate")
        yield annotation


def _wanted(source: Source, rules: SelectConfig) -> Iterator[Annotation]:
    """Those of the datasets that are asked for; what is too broken to name its dataset stays."""
    keep, drop = set(rules.datasets), set(rules.drop_datasets)
    return unique_ids(
        annotation
        for annotation in source.annotations()
        if not annotation.dataset or ((not keep or annotation.dataset in keep) and annotation.dataset not in drop)
    )


def _first(annotations: Iterator[Annotation], rules: SelectConfig) -> Iterator[Annotation]:
    kept: Counter[str] = Counter()
    for annotation in annotations:
        if annotation.error:
            yield annotation
        elif not rules.max_per_dataset or kept[annotation.dataset] < rules.max_per_dataset:
            kept[annotation.dataset] += 1
            yield annotation
            if kept.total() == rules.max_rows:
                return


def _drawn(source: Source, rules: SelectConfig, seed: int) -> Iterator[Annotation]:
    draw = _Draw[int](rules.max_rows, rules.max_per_dataset or rules.max_rows, seed)
    for place, annotation in enumerate(_wanted(source, rules)):
        if not annotation.error:
            draw.offer(annotation.dataset, annotation.sample_id, place)
    places = draw.items()
    del draw
    for place, annotation in enumerate(_wanted(source, rules)):
        if annotation.error or place in places:
            yield annotation


def _split(image: str, config: GenerateConfig) -> str:
    """Of a picture: the same for all questions about it."""
    return HELDOUT if _hash(config.seed, f"{HELDOUT}/{image}") < config.heldout_share * 2**64 else TRAIN


class _Draw(Generic[Item]):
    """A draw of `num` items from a stream (0 = no limit), at most `cap` of a stratum: of each those of lowest hash.

    It holds at most 2 * `num` items: the share of a stratum only falls as others grow, so what exceeds the largest
    share of today is never drawn.
    """

    def __init__(self, num: int, cap: int, seed: int) -> None:
        self._num = num
        self._seed = seed
        self._limit = cap  # of a stratum
        self._held = 0
        self._heaps: dict[str, list[tuple[int, Item]]] = {}  # (negative hash, item): the next to go comes first

    def offer(self, stratum: str, sample_id: str, item: Item) -> None:
        heap = self._heaps.setdefault(stratum, [])
        entry = (-_hash(self._seed, sample_id), item)
        if len(heap) >= self._limit:
            heapq.heappushpop(heap, entry)
            return
        heapq.heappush(heap, entry)
        self._held += 1
        if self._num and self._held > 2 * self._num:
            self._limit = max(self._shares().values())
            self._held = sum(self._cut(heap, self._limit) for heap in self._heaps.values())

    def items(self) -> set[Item]:
        """What is drawn; the draw is over."""
        if self._num:
            for stratum, share in self._shares().items():
                self._cut(self._heaps[stratum], share)
        return {item for heap in self._heaps.values() for _, item in heap}

    def _shares(self) -> dict[str, int]:
        return even_shares({stratum: len(heap) for stratum, heap in self._heaps.items()}, self._num, self._seed)

    def _cut(self, heap: list[tuple[int, Item]], size: int) -> int:
        while len(heap) > size:
            heapq.heappop(heap)
        return len(heap)


def _hash(seed: int, text: str) -> int:
    """64 bits that are the same in every process."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{text}".encode(), digest_size=8).digest())
