"""Opens an exported directory without JAX and compares it with numbers that JAX computed.

python unimm_jax/interop/check_export.py EXPORTED EXPECTED.npz
"""

import json
import sys
from typing import Any

TIE = 1e-4  # squared distance of unit vectors


def main(folder: str, expected: str) -> None:
    """Prints the largest differences of logits and of image features, and whether codes and ids are equal.

    Differences are relative to the largest value, or to 1.

    The ids are those of conversations and of prompts for images. Two codes at the same distance, up to rounding, count
    as equal: which one is nearer differs between libraries.
    """
    import numpy as np
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    wanted = np.load(expected)
    language = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found = language(torch.tensor(wanted["ids"])).logits.numpy()
    print(f"language model: largest difference of logits {difference(found, wanted['logits']):.1e}")
    if "images" in wanted:
        model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
        distances: list[Any] = []
        model.image_tokenizer.quantizer.register_forward_hook(
            lambda quantizer, inputs, _: distances.append(quantizer.distances(inputs[0]))
        )
        keep, codes = model.tokenize(torch.tensor(wanted["images"]))
        same = bool((keep.numpy() == wanted["keep"]).all())
        if same:
            of_kept, theirs = distances[0][keep], torch.tensor(wanted["codes"]).long()[keep]
            excess = of_kept.gather(1, theirs[:, None])[:, 0] - of_kept.min(1).values
            same = bool((excess < TIE).all())
        print(f"image tokenizer: keep masks and codes {'equal' if same else 'DIFFER'}")
        gaps = []
        for view, mask, features in zip(wanted["views"], wanted["keep"], wanted["features"], strict=False):
            with torch.no_grad():
                rows = model.features(torch.tensor(view), torch.tensor(mask)).numpy()
            count = model.settings["view_features"] or min(int(mask.sum()), len(features))
            gaps.append(difference(rows, features[:count]))
        print(f"vision encoder and connector: largest difference of features {np.max(gaps):.1e}")
        same = all(
            chat_ids(model.processor, json.loads(chat), torch.tensor(wanted["keep"])) == json.loads(ids)
            for chat, ids in zip(wanted["chats"].tolist(), wanted["ids_of_chats"].tolist(), strict=True)
        )
        print(f"chat template: token ids of {len(wanted['chats'])} conversations {'equal' if same else 'DIFFER'}")
        of_images = torch.tensor(wanted["keep"]), torch.tensor(wanted["codes"])
        prompts = [json.loads(prompt) for prompt in wanted["image_prompts"].tolist()]
        same = all(image_prompt_ids(model.processor, prompt, *of_images) == ids for prompt, ids in prompts)
        print(f"prompts for images: token ids of {len(prompts)} prompts {'equal' if same else 'DIFFER'}")
    if "jax" in sys.modules:
        raise RuntimeError("JAX was imported")


def difference(found: Any, wanted: Any) -> float:
    """The largest difference of two arrays, relative to the largest value, or to 1."""
    return float(abs(found - wanted).max() / max(1.0, abs(wanted).max()))


def chat_ids(processor: Any, chat: list[dict[str, Any]], keep: Any) -> list[int]:
    """Token ids of a conversation whose images have the first keep masks of `keep`, boolean [N, P]."""
    ids = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True)[0].tolist()
    count = sum(part["type"] == "image" for message in chat for part in message["content"])
    return processor.place_images(ids, keep[:count])[0]


def image_prompt_ids(processor: Any, prompt: Any, keep: Any, codes: Any) -> list[int]:
    """Token ids of a prompt for an image, whose images have the first keep masks and codes [N, P].

    Args:
      prompt: texts and images in order, or {"edits": INSTRUCTIONS}.
    """
    if isinstance(prompt, dict):
        count, segments = len(prompt["edits"]), processor.edit_prompt(prompt["edits"])
    else:
        count, segments = sum(not isinstance(part, str) for part in prompt), processor.image_prompt(prompt)
    return processor.lay_out(segments, keep[:count], codes[:count])[0]


if __name__ == "__main__":
    main(*sys.argv[1:3])
