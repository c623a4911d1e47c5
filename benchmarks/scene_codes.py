"""What the codes of scenes stand for when all patches are kept, and whether text to image counts the objects it draws.

SIZE=laptop-illume RUN=runs/laptop_illume bash launch/quickstart.sh
python -m benchmarks.scene_codes runs/laptop_illume [runs/another ...]

A code belongs to objects if more patches with an object have it than patches without. The table has, for each run:

- the number of codes of objects and of background;
- looks per code: exp of the entropy of an object's look (shape and color), given its code. 1 is best;
- background: exp of the entropy of a background patch's code, given that of the background patch before it. The
  language model has to choose among so many codes for each background patch;
- the probability of an object code, for captions with one object and the codes of their images: after the object, and
  at the 12th patch if there is none before. A model that counts has 0 and 0.2; one that does not has 0.063 in both.
  A run without a stage3 has none of them.
"""

import argparse
import pathlib

import numpy as np

from unimm_jax.data import scenes

IMAGES = 4000
CAPTIONS = 600
PATCH = 11  # of 16, from 0: five patches are left for the object
LOOKS = [(shape, color) for shape in scenes.SHAPES for color in scenes.COLOURS]


def entropy(counts: np.ndarray) -> float:
    """Mean entropy of the columns of counts [N, K], weighted by their sums, in nats."""
    columns = counts[:, counts.sum(0) > 0]
    shares = columns / columns.sum(0)
    each = -(shares * np.log(np.where(shares > 0, shares, 1))).sum(0)
    return float((each * columns.sum(0)).sum() / columns.sum())


def looks(scene: scenes.Scene) -> np.ndarray:
    """The place in `LOOKS` of the object in each cell, -1 without one: int64 [16]."""
    found = np.full(scenes.GRID**2, -1)
    for item in scene.objects:
        column, line = scenes.cell(item)
        found[line * scenes.GRID + column] = LOOKS.index((item.shape, item.colour))
    return found


def measure(run: pathlib.Path) -> list[str]:
    """The cells of a run's row."""
    from unimm_jax.data.records import Records

    records = Records(run / "records")
    header = records.header
    if header["sources"] != "scenes" or header["selection"] != "all" or header["positions"] != "order":
        raise SystemExit(f"{run}: its records are not those of size laptop-illume on the source scenes")
    kept = range(min(len(records), IMAGES))
    codes = np.stack([records[i].codes[0] for i in kept])
    drawn = [scenes.draw_scene(0, "train", int(records[i].key.split("/")[-1]), 1.0) for i in kept]
    look = np.stack([looks(scene) for scene in drawn])
    number = int(header["codes"])
    of_objects = np.zeros((len(LOOKS), number))
    np.add.at(of_objects, (look[look >= 0], codes[look >= 0]), 1)
    background = np.bincount(codes[look < 0], minlength=number)
    following = np.zeros((number, number))
    for row, empty in zip(codes, look < 0, strict=True):
        np.add.at(following, (row[empty][1:], row[empty][:-1]), 1)
    is_object = of_objects.sum(0) > background
    cells = [str(int(is_object.sum())), str(int((background > of_objects.sum(0)).sum()))]
    cells += [f"{np.exp(entropy(of_objects)):.2f}", f"{np.exp(entropy(following)):.2f}"]
    if not (run / "stage3" / "done.json").exists():
        return [*cells, "-", "-"]
    single = [i for i in kept if len(drawn[i].objects) == 1][:CAPTIONS]
    after, twelfth = object_probability(run, records, single, is_object, look)
    return [*cells, f"{after:.3f}", f"{twelfth:.3f}"]


def object_probability(
    run: pathlib.Path, records: object, chosen: list[int], is_object: np.ndarray, look: np.ndarray
) -> tuple[float, float]:
    """Probability of an object code in images with one object: (after it, at `PATCH` if none came before)."""
    import jax
    import jax.numpy as jnp

    from unimm_jax.data import tasks
    from unimm_jax.data.documents import render
    from unimm_jax.inference.generator import Generator
    from unimm_jax.inference.loading import load_model

    model = load_model(run / "stage3")
    generator = Generator(model, 64)
    first = generator.vocabulary.first_code
    items = [records[i] for i in chosen]
    prompts = [
        render(tasks.text_to_image_prompt(x.texts[0]), (), x.keep[:0], x.codes[:0], generator.layout).ids for x in items
    ]
    length = max(map(len, prompts)) + look.shape[1]
    tokens, segments = np.zeros((2, len(items), length), np.int32)
    for row, (prompt, item) in enumerate(zip(prompts, items, strict=True)):
        ids = [*prompt.tolist(), *(first + item.codes[0]).tolist()]
        tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1

    @jax.jit
    def probability(params: object, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        module = model.objective.module(params)
        places = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        hidden = module.language(module.language.embed(tokens), places, segments)
        probs = jax.nn.softmax(hidden @ module.language.head().T)
        return probs[..., first : first + len(is_object)] @ is_object

    with jax.set_mesh(model.mesh):
        found = np.asarray(probability(model.params, tokens, segments))
    after, twelfth = [], []
    for row, (prompt, i) in enumerate(zip(prompts, chosen, strict=True)):
        place = int(np.argmax(look[i] >= 0))
        of_patches = found[row, len(prompt) - 1 :]
        after += of_patches[place + 1 : look.shape[1]].tolist()
        if place >= PATCH:
            twelfth.append(float(of_patches[PATCH]))
    return float(np.mean(after)), float(np.mean(twelfth))


def main() -> None:
    """Entry point."""
    from unimm_jax import process

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=pathlib.Path, nargs="+")
    flags = parser.parse_args()
    process.prepare()
    print("| run | object codes | background codes | looks per code | background | p(object) after | at patch 12 |")
    print("|---|---|---|---|---|---|---|")
    for run in flags.runs:
        print(f"| {run} | {' | '.join(measure(run))} |", flush=True)


if __name__ == "__main__":
    main()
