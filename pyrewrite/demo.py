"""The demo: the bundled edits solved on the bundled generators, judged on images that they have not seen."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._files import write_atomically
from .edit import Edit
from .evaluation import AttributeClassifier, contact_sheet, edit_report, peeps_attributes
from .generators import Generator, load_generator
from .rewriting import Rewriter

SHOWN = 24  # images on a contact sheet
POOL = 1000  # images 0 to POOL - 1 are candidates for judging
UNCOVERED_FLIPS, COVERED_FLIPS, SUCCESS = 0.03, 0.10, 0.97  # what the demo's edits are held to


@dataclass(frozen=True)
class DemoEdit:
    """A bundled edit and how it is judged.

    applies: attribute -> value an image must have for the rule to apply. attribute, wanted: what the edit should make
    of it. covers: attributes whose place the object covers, so that some of them may change with it.
    """

    name: str
    title: str
    generator: str
    applies: dict[str, Any]
    attribute: str
    wanted: int
    covers: tuple[str, ...] = ()

    def record(self) -> Edit:
        return Edit.load(_assets() / f"{self.name}.json")


def _assets() -> Path:
    return Path(str(resources.files("pyrewrite") / "assets" / "edits"))


def demo_edits() -> list[DemoEdit]:
    """The bundled edits in the order in which the demo runs them."""
    listed = json.loads((_assets() / "index.json").read_text(encoding="utf-8"))
    return [DemoEdit(**{**entry, "covers": tuple(entry.get("covers", ()))}) for entry in listed["edits"]]


@dataclass
class DemoResult:
    """One dict per edit and solver, and the seconds of the whole."""

    edits: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {"edits": self.edits, "seconds": self.seconds}

    def table(self) -> str:
        """The results as text; flips are those of attributes whose place the object does not cover / does cover."""
        head = ("edit", "preset", "images", "took", "flips", "region", "inside", "outside", "seconds")
        rows = [head]
        for entry in self.edits:
            change, region = entry["change"], entry["region"]
            rows.append(
                (
                    entry["title"],
                    entry["preset"],
                    str(entry["images"]),
                    f"{entry['success']:.0%}",
                    f"{entry['uncovered_flips']:.0%} / {entry['covered_flips']:.0%}",
                    f"{region['ratio']:.2f}",
                    f"{change['inside']['l1']:.3f}",
                    f"{change['outside']['l1']:.3f}",
                    f"{entry['seconds']['solve']:.1f}",
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [
            "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        ]
        return "\n".join([*lines, "", *_LEGEND, f"All of it took {self.seconds:.0f} s."])


_LEGEND = (
    "took: share of the images where the classifier sees the edit. flips: share of the images where another attribute",
    "changed, the worst one the object does not cover / covers. region: distance to the object as pasted, 0 is the",
    "object, 1 no change. inside, outside: mean |change| of the pixels, of a range of 2. seconds: solving.",
)


def run_demo(
    out: Path,
    *,
    only: Sequence[str] = (),
    count: int = 100,
    official: bool = True,
    device: str = "cpu",
    log: Callable[[str], None] = lambda text: None,
) -> DemoResult:
    """Solve, apply and judge the bundled edits; write records, patches, sheets and results.json into `out`.

    count: images to judge each edit on, none of which the edit has seen. official: also with preset="official" and its
    linear insert.
    Raises ValueError for an edit that is not bundled.
    """
    chosen = demo_edits()
    unknown = set(only) - {e.name for e in chosen}
    if unknown:
        raise ValueError(f"no bundled edit {sorted(unknown)[0]!r}; there are {', '.join(e.name for e in chosen)}")
    if count < 1:
        raise ValueError(f"images is {count}; expected at least 1")
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    result = DemoResult()
    stages: dict[str, _Stage] = {}
    for demo in chosen:
        if only and demo.name not in only:
            continue
        if demo.generator not in stages:
            stages[demo.generator] = _Stage.load(demo.generator, device)
        stage = stages[demo.generator]
        result.edits.extend(_run_edit(stage, demo, out, count, official, log))
    result.seconds = time.perf_counter() - start
    write_atomically(out / "results.json", json.dumps(result.to_dict(), indent=1).encode())
    write_atomically(out / "results.txt", (result.table() + "\n").encode())
    return result


@dataclass
class _Stage:
    """A loaded generator with what its edits share: the truth about its images, those rendered, the statistics."""

    generator: Generator
    truth: dict[str, Tensor]
    classifier: AttributeClassifier
    images: dict[int, Tensor] = field(default_factory=dict)
    attributes: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    statistics: dict[tuple[str, int], Any] = field(default_factory=dict)

    @classmethod
    def load(cls, name: str, device: str) -> _Stage:
        generator = load_generator(name, device=device)
        truth = peeps_attributes(generator.latents(range(POOL)).cpu(), generator.family)
        return cls(generator, truth, AttributeClassifier())

    def numbers(self, demo: DemoEdit, used: set[int], count: int) -> list[int]:
        """`count` image numbers where the rule applies and that the edit has not seen, those rendered already first."""
        applies = torch.ones(POOL, dtype=torch.bool)
        for name, value in demo.applies.items():
            applies &= self.truth[name] == value
        fitting = [n for n in applies.nonzero()[:, 0].tolist() if n not in used]
        return sorted(sorted(fitting, key=lambda n: (n not in self.images, n))[:count])

    def before(self, numbers: list[int]) -> Tensor:
        """The images without any patch, B x 3 x H x W; rendered and classified once."""
        missing = [n for n in numbers if n not in self.images]
        if missing:
            images = self.generator.images(missing)
            found = self.classifier.predict(images)
            self.images.update(zip(missing, images, strict=True))
            self.attributes.update({n: {a: v[i] for a, v in found.items()} for i, n in enumerate(missing)})
        return torch.stack([self.images[n] for n in numbers])

    def found_before(self, numbers: list[int]) -> dict[str, Tensor]:
        """What the classifier says of `before(numbers)`: B each."""
        found = [self.attributes[n] for n in numbers]
        return {name: torch.stack([f[name] for f in found]) for name in found[0]}

    def rewriter(self, record: Edit) -> Rewriter:
        settings = record.resolve()
        key = (record.layer, settings.samples)
        rewriter = Rewriter(
            self.generator,
            record.layer,
            samples=settings.samples,
            seed=settings.seed,
            statistics=self.statistics.get(key),
        )
        self.statistics[key] = rewriter.statistics
        return rewriter


def _run_edit(
    stage: _Stage, demo: DemoEdit, out: Path, count: int, official: bool, log: Callable[[str], None]
) -> list[dict[str, Any]]:
    record = demo.record()
    clock = time.perf_counter()
    rewriter = stage.rewriter(record)
    statistics_seconds = time.perf_counter() - clock
    used = {s.image for s in (record.object, record.paste, *record.context) if s is not None}
    numbers = stage.numbers(demo, used, count)
    clock = time.perf_counter()
    before = stage.before(numbers)
    activations = rewriter.activations(numbers)
    pasted, alpha = rewriter.pasted(record, activations)
    render_seconds = time.perf_counter() - clock
    record.save(out / f"{demo.name}.json")
    rows, captions, entries = [before], ["before"], []
    for preset in (None, "official") if official else (None,):
        clock = time.perf_counter()
        # The published linear insert: the projected solver needs minutes for all edits and leaves more loss behind.
        patch = rewriter.solve(record, preset, method=preset and "low_rank")
        solve_seconds = time.perf_counter() - clock
        clock = time.perf_counter()
        after = rewriter.rendered(activations, patch)
        shown_seconds = time.perf_counter() - clock
        clock = time.perf_counter()
        entry = _judge(demo, stage, numbers, after, pasted, alpha)
        entry["preset"] = preset or "default"
        entry["seconds"] = {
            "statistics": statistics_seconds,
            "solve": solve_seconds,
            "render": render_seconds + shown_seconds,
            "judge": time.perf_counter() - clock,
        }
        entry["report"] = patch.report.to_dict()
        entries.append(entry)
        rows.append(after)
        captions.append("after" if preset is None else preset)
        patch.save(out / (f"{demo.name}.safetensors" if preset is None else f"{demo.name}.{preset}.safetensors"))
        log(f"{demo.title}, {entry['preset']}: {entry['success']:.0%} of {len(numbers)}, {solve_seconds:.1f} s")
    contact_sheet(
        [row[:SHOWN] for row in rows],
        captions,
        out / f"{demo.name}.png",
        title=demo.title,
        labels=[str(n) for n in numbers[:SHOWN]],
    )
    return entries


def _judge(
    demo: DemoEdit, stage: _Stage, numbers: list[int], after: Tensor, pasted: Tensor, alpha: Tensor
) -> dict[str, Any]:
    report = edit_report(
        stage.before(numbers),
        after,
        attribute=demo.attribute,
        wanted=demo.wanted,
        mask=(alpha > 0).float(),
        pasted=pasted,
        alpha=alpha,
        classifier=stage.classifier,
        found_before=stage.found_before(numbers),
    ).as_dict()
    flips = report["flips"]
    return {
        "name": demo.name,
        "title": demo.title,
        "generator": demo.generator,
        **report,
        "uncovered_flips": max((v for n, v in flips.items() if n not in demo.covers), default=0.0),
        "covered_flips": max((v for n, v in flips.items() if n in demo.covers), default=0.0),
    }
