"""The edits benchmark: single edits and chains of two on test scenes, judged exactly."""

import dataclasses
from typing import Any

import numpy as np

from unimm_jax.config import ranged
from unimm_jax.data import scene_edits, scenes
from unimm_jax.data.scene_edits import SceneEdit
from unimm_jax.evals.base import Context, Options, Result
from unimm_jax.evals.generation import EVALUATION_SEED, GeneratingEvaluator
from unimm_jax.evals.scene_detector import detect, edit_exact, edit_right
from unimm_jax.evals.scenes import with_overall
from unimm_jax.inference.generator import Generator
from unimm_jax.inference.sampling import Sampling
from unimm_jax.plotting import enlarged, grid

OFFSET = 1_000_000  # between the indices of chains of different length
SHOWN = {1: 20, 2: 10}  # chains in the report, by number of turns


@dataclasses.dataclass(frozen=True)
class EditsOptions(Options):
    """Options.

    Attributes:
      edits: number of single edits, chains: number of chains of two edits; at least 2 of each, for the controls.
      guidance: classifier-free guidance, away from the reconstruction of the source. temperature: 0 is greedy.
    """

    edits: int = ranged(200, low=2)
    chains: int = ranged(100, low=2)
    guidance: float = ranged(1.0, low=0)
    temperature: float = ranged(0.7, low=0)


class Edits(GeneratingEvaluator):
    """Edits of scenes of the test split. The edits and seeds are the same at every call and for every model.

    An edit is right if every object of the target is found and nothing else; it is exact if also the other objects
    keep their size, and the background its color. References stand beside the scores: copying the source, which is
    never right, drawing from the instructions alone, the same edits with the source of another edit, and how often the
    image tokenizer and the decoder reconstruct a target exactly.
    """

    options = EditsOptions

    def score(self, generator: Generator, context: Context) -> Result:
        """See `GeneratingEvaluator.score`."""
        s: EditsOptions = self.settings
        if not self.can_draw(generator, context, "editing"):
            return Result({})
        sampling = Sampling(guidance=s.guidance, temperature=s.temperature)
        result = Result({}, settings={"edit_sampling": dataclasses.asdict(sampling)})
        rows: list[dict[str, Any]] = []
        for turns, count in ((1, s.edits), (2, s.chains)):
            chains = [scene_edits.draw_chain(EVALUATION_SEED, "test", turns * OFFSET + i, turns) for i in range(count)]
            sources = rendered([chain[0].source for chain in chains], generator)
            instructions = [[edit.instruction for edit in chain] for chain in chains]
            made = generator.edit_images(sources, instructions, sampling, EVALUATION_SEED)
            right = np.array([judged(chains, turn, made[turn]) for turn in range(turns)])  # [turns, chains]
            words = [[", then ".join(spoken)] for spoken in instructions]
            alone = generator.compose_images(words, sampling, EVALUATION_SEED)
            others = generator.edit_images(np.roll(sources, 1, axis=0), instructions, sampling, EVALUATION_SEED)[-1]
            name = "edit_single" if turns == 1 else "edit_two_turns"
            result.scores |= {
                name: float(right[-1].mean()),
                f"{name}_exact": float(np.mean(exact(chains, turns - 1, made[-1]))),
                f"{name}_copied": float(np.mean(judged(chains, turns - 1, sources))),
                f"{name}_without_source": float(np.mean(judged(chains, turns - 1, alone))),
                f"{name}_other_source": float(np.mean(judged(chains, turns - 1, others))),
            }
            result.outcomes[name] = right[-1].tolist()
            if turns == 1:
                by_kind = {
                    kind: [ok for chain, ok in zip(chains, right[0], strict=True) if chain[0].kind == kind]
                    for kind in scene_edits.KINDS
                }
                found = {kind: float(np.mean(values)) for kind, values in by_kind.items() if values}
                result.scores["edit_single_by_kind"] = with_overall(found)
                targets = rendered([chain[0].target for chain in chains], generator)
                again = generator.decode(*generator.tokenize(targets))
                result.scores["edit_exact_reconstruction"] = float(np.mean(exact(chains, 0, again)))
            else:
                result.scores["edit_first_of_two"] = float(right[0].mean())
            rows += shown(chains[: SHOWN[turns]], sources, made, right, generator)
        result.examples["edits"] = rows
        return result


def rendered(found: list[scenes.Scene], generator: Generator) -> np.ndarray:
    """Scenes as images uint8 [N, S, S, 3] of the size that the model reads."""
    return np.stack([scenes.render(scene, generator.config.data.image_size) for scene in found])


def judged(chains: list[list[SceneEdit]], turn: int, images: np.ndarray) -> list[bool]:
    """Whether each image is right after a turn of its chain."""
    return [edit_right(chain[turn], detect(image)) for chain, image in zip(chains, images, strict=True)]


def exact(chains: list[list[SceneEdit]], turn: int, images: np.ndarray) -> list[bool]:
    """Whether each image is exact after a turn of its chain."""
    return [edit_exact(chain[turn], image) for chain, image in zip(chains, images, strict=True)]


def shown(
    chains: list[list[SceneEdit]], sources: np.ndarray, made: list[np.ndarray], right: np.ndarray, generator: Generator
) -> list[dict[str, Any]]:
    """Examples for the report. The image of each is the source, the result of each turn, and the last target."""
    rows = []
    for i, chain in enumerate(chains):
        target = rendered([chain[-1].target], generator)[0]
        images = [enlarged(image) for image in (sources[i], *(results[i] for results in made), target)]
        row: dict[str, Any] = dict(file=f"edit_{len(chain)}_{i:03d}.png", image=grid(images, len(images)))
        row |= dict(kinds=[edit.kind for edit in chain], instructions=[edit.instruction for edit in chain])
        rows.append(row | dict(right=[bool(ok) for ok in right[:, i]]))
    return rows
