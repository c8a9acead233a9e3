"""The command line: progress and warnings on stderr, results on stdout; torch is imported where it is needed."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from ._version import __version__


class OutFile(click.Path):
    """A file to be written: a wrong ending or a folder that is not there is said before the work and not after it."""

    def __init__(self, *endings: str) -> None:
        super().__init__(dir_okay=False)
        self.endings = endings

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(super().convert(value, param, ctx))
        if path.exists() and not path.is_file():  # a device, such as /dev/null
            return value
        if path.suffix.lower() not in self.endings:
            self.fail(f"{value!r} does not end in {' or '.join(self.endings)}.", param, ctx)
        if not path.parent.is_dir():
            self.fail(f"cannot write {value!r}: the folder {str(path.parent)!r} does not exist.", param, ctx)
        if not os.access(path.parent, os.W_OK):
            self.fail(f"cannot write {value!r}: no permission to write in {str(path.parent)!r}.", param, ctx)
        return value


CHECKPOINT = OutFile(".safetensors", ".pt", ".pth")
SHEET = OutFile(".png", ".jpg", ".jpeg", ".webp")

FILE = click.argument("file", metavar="GENERATOR")
DEVICE = click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1, ...")
TRUNCATION = click.option("--truncation", type=float, default=None, help="Pull latents towards the mean; 1 is off.")
SEED = click.option("--seed", type=int, default=1, show_default=True, help="Seed of the numbered images.")
LABEL = click.option("--label", type=int, default=None, help="Class of all images, for a generator with class labels.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
STRENGTH = click.option(
    "--strength", type=float, default=1.0, show_default=True, help="0 is the original, 1 the patch."
)
CACHE = click.option("--cache", type=click.Path(file_okay=False), help="Folder of the statistics cache.")


class Commands(click.Group):
    """Turns the package's own errors into one line on stderr and exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        warnings.showwarning = _show_warning
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # whoever read the output has seen enough: click ends quietly
            raise
        except (ValueError, OSError) as error:
            raise click.ClickException(str(error)) from error
        except RuntimeError as error:
            from .ops._library import MissingKernelError

            if not isinstance(error, MissingKernelError):
                raise
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            click.echo("stopped; every file is whole or as it was", err=True)
            ctx.exit(130)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    click.echo(f"warning: {message}", err=True)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pyrewrite")
def main() -> None:
    """Change a rule inside a pretrained image generator.

    GENERATOR is a file of a StyleGAN2 (rosinality, NVIDIA .pkl, GenForce, mmgeneration), a StyleGAN3, a Progressive GAN
    or a DCGAN, or the name of a bundled one: peeps (StyleGAN2), peeps-progan.

    Begin with `pyrewrite demo`, which leaves edit records to solve, or with `pyrewrite ui peeps`, which paints them.
    `python -m pyrewrite` says what was built and what this machine offers.
    """


@main.command()
@FILE
@DEVICE
@JSON
def info(file: str, device: str, as_json: bool) -> None:
    """Describe a generator: family, sizes, layers, hash.

    Says too which of several generators in the file was taken, what was decided while loading, and whether a picture
    renders with sane values.
    """
    generator = _load(file, device, None)
    data = {
        "file": file,
        "family": generator.family,
        "layout": generator.layout,
        "architecture": getattr(generator, "architecture", None),
        "classes": generator.classes,
        "image_size": generator.image_size,
        "z_dim": generator.z_dim,
        "hash": generator.weights_hash(),
        "clamps": {n: v for n, v in generator.file_settings().items() if n.endswith(".conv_clamp")},
        "notes": generator.notes,
        "unusual": generator.unusual_picture(),
        "layers": [
            {
                "name": layer.name,
                "resolution": layer.resolution,
                "in_channels": layer.in_channels,
                "out_channels": layer.out_channels,
                "kernel_size": layer.kernel_size,
                "upsample": layer.upsample,
            }
            for layer in generator.layers.values()
        ],
    }
    if as_json:
        _print_json(data)
        return
    click.echo(f"{file}: {generator.family}, {generator.image_size} x {generator.image_size}, z of {generator.z_dim}")
    architecture = f", architecture {data['architecture']}" if data["architecture"] else ""
    click.echo(f"layout of the weights: {generator.layout}{architecture}")
    click.echo(f"hash {data['hash']}")
    for layer in generator.layers.values():
        click.echo(f"  {layer!r}")
    for bound in sorted(set(data["clamps"].values())):
        count = list(data["clamps"].values()).count(bound)
        click.echo(f"clamp: {count} convolutions keep what they put out within {bound:.4g} of 0")
    for note in generator.notes:
        click.echo(f"note: {note}")
    click.echo(f"warning: {data['unusual']}" if data["unusual"] else "image 0 of seed 1 renders with sane values")


@main.command()
@FILE
@click.option("--out", type=CHECKPOINT, required=True, help="A .safetensors, .pt or .pth file; the name decides.")
@JSON
def convert(file: str, out: str, as_json: bool) -> None:
    """Write any generator that loads in another format.

    \b
    .safetensors  all families, class labels too, with family and hash beside the weights
    .pt, .pth     StyleGAN2: rosinality's {g_ema, latent_avg}; StyleGAN3: {G_ema} with NVIDIA's names;
                  Progressive GAN: the official {state_dict}; DCGAN: the state dict of the PyTorch tutorial

    The result is loaded again and compared with what was written.
    """
    from .generators import save_generator

    generator = _load(file, "cpu", None)
    save_generator(generator, out)
    if _load(out, "cpu", None).weights_hash() != generator.weights_hash():
        raise ValueError(f"{out} does not hold the weights of {file}: do not use it")
    data = {"file": out, "family": generator.family, "hash": generator.weights_hash(), "notes": generator.notes}
    if as_json:
        _print_json(data)
        return
    click.echo(f"{out}: {generator.family} from the layout {generator.layout}, hash {data['hash']}")
    for note in generator.notes:
        click.echo(f"note: {note}")


@main.command()
@FILE
@click.argument("layer")
@click.option("--samples", type=int, default=1000, show_default=True, help="Number of images.")
@click.option("--out", type=OutFile(".npz"), help="Write the second moment as .npz (count, mom2).")
@DEVICE
@TRUNCATION
@LABEL
@SEED
@CACHE
@JSON
def stats(
    file: str,
    layer: str,
    samples: int,
    out: str | None,
    device: str,
    truncation: float | None,
    label: int | None,
    seed: int,
    cache: str | None,
    as_json: bool,
) -> None:
    """Collect the second moment of a layer's keys (cached).

    Several processes share the work: torchrun --nproc-per-node 4 -m pyrewrite stats GENERATOR LAYER
    """
    from .statistics import collect, collect_shared

    settings = {"samples": samples, "seed": seed, "cache_dir": cache, "progress": True}
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # started by torchrun
        import torch.distributed

        from .statistics.shards import join_group

        device = join_group(device)
        try:
            found = collect_shared(_load(file, device, truncation, label), layer, **settings)
            first = torch.distributed.get_rank() == 0
        finally:
            torch.distributed.destroy_process_group()
        if not first:
            return
    else:
        found = collect(_load(file, device, truncation, label), layer, **settings)
    eigenvalues = found.moment.matrix.cpu().double().numpy()
    import numpy as np

    spectrum = np.linalg.eigvalsh(eigenvalues)[::-1]
    if out:
        found.moment.save(out)
    data = {
        "layer": layer,
        "count": found.moment.count,
        "channels": len(spectrum),
        "mean_square": float(spectrum.mean()),
        "largest_eigenvalue": float(spectrum[0]),
        "directions_for_99_percent": int((spectrum.cumsum() < 0.99 * spectrum.sum()).sum()) + 1,
        "from_cache": found.from_cache,
        "seconds": found.seconds,
    }
    if as_json:
        _print_json(data)
    else:
        click.echo("\n".join(_lines(data)))


def _settings_options(command):
    options = [
        click.option("--preset", type=click.Choice(["official"]), help="The published behaviour."),
        click.option(
            "--method",
            type=click.Choice(["low_rank", "projected", "least_squares"]),
            help="How the weights are found; least_squares is the closed form.",
        ),
        click.option("--rank", type=int, help="How many directions of the layer's keys may change."),
        click.option(
            "--targets", type=click.Choice(["paste", "context"]), help="The pasted image alone or all of the context."
        ),
        click.option(
            "--key-method",
            type=click.Choice(["zca", "mean", "svd", "gandissect"]),
            help="How the directions come from the context's keys.",
        ),
        click.option("--preserve", type=float, help="Weight of the penalty on change elsewhere."),
        click.option("--shrinkage", type=float, help="Between whitening (0) and none (large)."),
        click.option("--margin", type=int, help="Pixels of the layer's map around the object that stay as they are."),
        click.option("--steps", type=int, help="Of the optimisation."),
        click.option("--lr", type=float, help="Learning rate of the optimisation."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@main.command()
@FILE
@click.argument("edit", type=click.Path(exists=True, dir_okay=False))
@click.option("--out", type=OutFile(".safetensors"), required=True, help="The patch, a .safetensors file.")
@click.option("--layer", help="Layer to edit.  [default: the record's]")
@click.option("--samples", type=int, help="Images for the statistics.  [default: the record's, or 1000]")
@click.option("--erase", "units", type=int, help="Remove what the context shows: silence this many units.")
@click.option("--zero", is_flag=True, help="Remove what the context shows, in closed form.")
@_settings_options
@DEVICE
@TRUNCATION
@LABEL
@click.option("--seed", type=int, help="Seed of the numbered images.  [default: the record's, or 1]")
@CACHE
@JSON
def solve(
    file: str,
    edit: str,
    out: str,
    layer: str | None,
    samples: int | None,
    units: int | None,
    zero: bool,
    preset: str | None,
    device: str,
    truncation: float | None,
    label: int | None,
    seed: int | None,
    cache: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Solve an edit record and write the patch.

    Settings that are not given are the record's, and those that it does not name the defaults that work best.
    """
    from .edit import Edit
    from .rewriting import Rewriter

    if zero and units is not None:
        raise click.UsageError("--erase and --zero are two ways to remove: give one of them")
    if zero and preset:
        raise click.UsageError("--zero is a closed form: --preset has no part in it")
    record = Edit.load(edit)
    layer = layer or record.layer
    if layer is None:
        raise click.UsageError("the record does not name a layer: give --layer (see `pyrewrite info`)")
    chosen = record.resolve(preset, **settings)  # a setting that cannot be is said before any work
    truncation = chosen.truncation if truncation is None else truncation
    generator = _load(file, device, truncation, None)
    generator.apply_settings({**(record.images or {}), **({} if label is None else {"label": label})})
    rewriter = Rewriter(
        generator,
        layer,
        samples=samples or chosen.samples,
        seed=chosen.seed if seed is None else seed,
        cache_dir=cache,
        warn=as_json,  # the printed report says its warnings itself
    )
    if zero:
        patch = rewriter.zero(record, **settings)
    else:
        with click.progressbar(length=1000, label="solving", file=sys.stderr) as bar:

            def progress(done: int, loss: float) -> None:
                bar.update(int(1000 * done / chosen.steps) - bar.pos)

            if units is not None:
                patch = rewriter.erase(record, units, preset, progress=progress, **settings)
            else:
                patch = rewriter.solve(record, preset, progress=progress, **settings)
    patch.save(out)
    if as_json:
        _print_json({"patch": out, "report": patch.report.to_dict(), "settings": patch.settings})
    else:
        click.echo(f"{out}: {patch.report}")


@main.command()
@FILE
@click.argument("patches", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False))
@click.option("--out", type=CHECKPOINT, required=True, help="The edited checkpoint: .safetensors, .pt or .pth.")
@STRENGTH
@click.option("--force", is_flag=True, help="Apply to a generator that the patch was not made for.")
def apply(file: str, patches: tuple[str, ...], out: str, strength: float, force: bool) -> None:
    """Merge patches into a checkpoint of the same format."""
    from .generators import save_generator

    generator = _load(file, "cpu", None)
    for patch in _patches(patches, strength):
        patch.apply_(generator, force=force)
    save_generator(generator, out)
    click.echo(f"{out}: {generator.family} with {' and '.join(patches)}, hash {generator.weights_hash()}")


@main.command()
@FILE
@click.option("--images", default="0-23", show_default=True, help="Image numbers, such as 0-8,12,200-212.")
@click.option(
    "--patch",
    "patches",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    help="Show the images before and after it; may be given again.",
)
@STRENGTH
@click.option("--force", is_flag=True, help="Apply to a generator that the patch was not made for.")
@click.option("--out", type=SHEET, required=True, help="The sheet, a .png, .jpg or .webp file.")
@DEVICE
@TRUNCATION
@LABEL
@SEED
def sample(
    file: str,
    images: str,
    patches: tuple[str, ...],
    strength: float,
    force: bool,
    out: str,
    device: str,
    truncation: float | None,
    label: int | None,
    seed: int,
) -> None:
    """Write a sheet of numbered images.

    With patches it shows each of them before and after all of the patches together.
    """
    from .evaluation import contact_sheet

    numbers = parse_numbers(images)
    generator = _load(file, device, truncation, label)
    rows = [generator.images(numbers, seed)]
    if patches:
        for patch in _patches(patches, strength):
            patch.apply_(generator, force=force)
        rows.append(generator.images(numbers, seed))
    contact_sheet(rows, ["before", "after"] if patches else [""], out, labels=[str(n) for n in numbers])
    click.echo(f"{out}: images {images}")


@main.command()
@FILE
@click.argument("patches", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False))
@click.option("--images", default="0-99", show_default=True, help="Image numbers, such as 0-8,12,200-212.")
@click.option(
    "--edit", type=click.Path(exists=True, dir_okay=False), help="The record: change inside and outside its mask."
)
@STRENGTH
@click.option("--force", is_flag=True, help="Apply to a generator that the patch was not made for.")
@click.option("--attributes", is_flag=True, help="Rates by the bundled classifier of drawn busts.")
@click.option("--out", type=SHEET, help="Also write a sheet, a .png, .jpg or .webp file.")
@DEVICE
@TRUNCATION
@LABEL
@SEED
@JSON
def evaluate(
    file: str,
    patches: tuple[str, ...],
    images: str,
    edit: str | None,
    strength: float,
    force: bool,
    attributes: bool,
    out: str | None,
    device: str,
    truncation: float | None,
    label: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Measure what patches change in numbered images."""
    from .evaluation.measure import measure_patches

    numbers = parse_numbers(images)
    generator = _load(file, device, truncation, label)
    data = measure_patches(
        generator,
        _patches(patches, strength),
        numbers,
        seed=seed,
        edit=edit,
        attributes=attributes,
        force=force,
        sheet=out,
    )
    if as_json:
        _print_json(data)
    else:
        click.echo("\n".join(_lines(data)))


@main.command()
@click.option("--out", type=click.Path(file_okay=False), default="pyrewrite-demo", show_default=True)
@click.option("--edit", "only", multiple=True, help="Only this edit, by name; may be given again.")
@click.option("--images", "count", type=int, default=100, show_default=True, help="Images to judge each edit on.")
@click.option("--official/--no-official", default=True, show_default=True, help="Solve with preset=official beside.")
@DEVICE
@JSON
def demo(out: str, only: tuple[str, ...], count: int, official: bool, device: str, as_json: bool) -> None:
    """Solve the bundled edits and judge them on unseen images."""
    from .demo import run_demo

    result = run_demo(
        Path(out), only=only, count=count, official=official, device=device, log=lambda t: click.echo(t, err=True)
    )
    if as_json:
        _print_json(result.to_dict())
    else:
        click.echo(result.table())


@main.command()
@FILE
@click.option("--layer", help="Layer to begin with.  [default: one that usually fits]")
@click.option("--images", default="0-31", show_default=True, help="Pictures to begin with, such as 0-8,12,200-212.")
@click.option("--samples", type=int, default=1000, show_default=True, help="Images for the statistics.")
@click.option(
    "--folder", type=click.Path(file_okay=False), default="pyrewrite-edits", show_default=True, help="Saved edits."
)
@click.option("--port", type=int, help="Port on 127.0.0.1, 0 for any.  [default: the first free one from 8765 on]")
@click.option(
    "--allow-origin", multiple=True, metavar="ORIGIN", help="Also answer behind this proxy: https://hub.example"
)
@click.option("--base-path", default="/", show_default=True, help="Path that a proxy leaves in front.")
@click.option("--open", "open_browser", is_flag=True, help="Open the page in the browser of this machine.")
@DEVICE
@TRUNCATION
@LABEL
@SEED
@CACHE
def ui(
    file: str,
    layer: str | None,
    images: str,
    samples: int,
    folder: str,
    port: int | None,
    allow_origin: tuple[str, ...],
    base_path: str,
    open_browser: bool,
    device: str,
    truncation: float | None,
    label: int | None,
    seed: int,
    cache: str | None,
) -> None:
    """Copy, paste and rewrite in the browser.

    The page answers on 127.0.0.1 of this machine only, at an address with a secret token. From another machine, forward
    the port with `ssh -L 8765:127.0.0.1:8765 HOST` and open the address that is printed.
    """
    try:
        from .interface import Session, serve
    except ModuleNotFoundError as error:
        raise click.ClickException(str(error)) from error

    generator = _load(file, device, truncation, label)
    session = Session(
        generator,
        layer=layer,
        samples=samples,
        seed=seed,
        folder=folder,
        cache_dir=cache,
        name=Path(file).name,
        strip=images,
    )
    try:
        page = serve(session, port, allow_origin, base_path)
        try:
            click.echo(page.address)
            click.echo("open this address in a browser; Ctrl-C ends the page", err=True)
            if open_browser:
                click.launch(page.address)
            page.wait()
        finally:
            page.close()
    finally:
        session.close()


def parse_numbers(text: str) -> list[int]:
    """ "0-8,12,200-212" -> image numbers in that order, each once. ValueError names the part that is wrong."""
    numbers: dict[int, None] = {}
    for part in (p.strip() for p in text.split(",")):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"image numbers {text!r}: {part!r} is not a number or a range; expected such as 0-8,12")
        if dash and int(last) < int(first):
            raise ValueError(f"image numbers {text!r}: the range {part!r} ends before it begins")
        if int(last or first) - int(first) >= 100_000:
            raise ValueError(f"image numbers {text!r}: the range {part!r} has more than 100000 images")
        numbers.update(dict.fromkeys(range(int(first), int(last or first) + 1)))
    return list(numbers)


def _load(file: str, device: str, truncation: float | None, label: int | None = None):
    from .generators import load_generator

    generator = load_generator(file, device=device, **({} if truncation is None else {"truncation": truncation}))
    if label is not None:
        generator.label = label
    return generator


def _patches(paths: tuple[str, ...], strength: float):
    from .rewriting import LowRankPatch

    patches = [LowRankPatch.load(path) for path in paths]
    return [patch if strength == 1 else patch.scaled(strength) for patch in patches]


def _lines(data: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Nested measures as lines: the innermost names of each group side by side."""
    plain = {name: value for name, value in data.items() if not isinstance(value, dict)}
    said = (f"{name.replace('_', ' ')} {_plain(value)}" for name, value in plain.items() if value is not None)
    if text := ", ".join(said):
        yield f"{prefix}: {text}" if prefix else text
    for name, value in data.items():
        if isinstance(value, dict):
            yield from _lines(value, f"{prefix} {name}".strip())


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=1))


if __name__ == "__main__":
    main()
