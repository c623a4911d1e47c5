"""Parity with the LaVIT reference on numbers dumped from it, module by module, weights entering under their own names.

`LAVIT_FIXTURE` names another file of the same layout. Masks and ids must be equal; floats within 1e-4 of the largest.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
from flax import nnx

from unimm_jax import resolve, sharding, text_tokenizer
from unimm_jax.data import pipeline
from unimm_jax.inference.generator import Generator
from unimm_jax.inference.loading import LoadedTokenizer, Model
from unimm_jax.inference.sampling import Sampling
from unimm_jax.interop import import_lavit, lavit, llama
from unimm_jax.interop.encoders import eva
from unimm_jax.interop.table import compare, foreign_shapes, to_ours, to_theirs
from unimm_jax.models.conditioner import Conditioner, ConditionerConfig
from unimm_jax.models.keys import Keys
from unimm_jax.models.language import LanguageConfig
from unimm_jax.models.tokenizer import ImageTokenizer, ImageTokenizerConfig
from unimm_jax.models.tokenizer.quantizer import cosine_kmeans, ema_update, l2_normalize
from unimm_jax.models.tokenizer.selector import argmax_mask, straight_through
from unimm_jax.models.unified import UnifiedConfig, UnifiedModel
from unimm_jax.models.vit import ViTConfig, patchify
from unimm_jax.objectives.language_modeling import LanguageModeling
from unimm_jax.objectives.tokenization import reconstruction_loss
from unimm_jax.sharding import flatten, unflatten
from unimm_jax.vocabulary import Vocabulary

FIXTURE, META = peers.LAVIT, peers.LAVIT_META
C, IDS = META["config"], META["ids"]
MODES = ("argmax", "sampled")


@pytest.fixture(autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield


def close(found, name, scale=1e-4):
    wanted = FIXTURE[name] if isinstance(name, str) else name
    found = np.asarray(found, np.float64)
    assert found.shape == wanted.shape, (name, found.shape, wanted.shape)
    gap = np.abs(found - wanted).max() / max(1.0, np.abs(wanted).max())
    assert gap <= scale, (name if isinstance(name, str) else "", gap)


def load(shapes, table, source, ignore=lambda name: False):
    """Parameters by path, from a reference component, every name accounted for."""
    compare(foreign_shapes(table, shapes), {k: v.shape for k, v in source.items()}, ignore)
    return {e.ours: jnp.asarray(to_ours(e, source.__getitem__, shapes[e.ours])) for e in table}


ENCODER = ViTConfig(
    image_size=C["img_size"],
    patch_size=C["patch_size"],
    width=C["width"],
    depth=C["enc_layers"],
    heads=C["width"] // C["head_width"],
    mlp_width=int(C["width"] * C["mlp_ratio"]),
    scan=False,
)
TOKENIZER = ImageTokenizerConfig(
    heads=C["heads"],
    mlp_width=int(C["width"] * C["mlp_ratio"]),
    merger_depth=C["merger_layers"],
    decoder_depth=C["dec_layers"],
    codes=C["n_code"],
    code_width=C["code_dim"],
    scan=False,
)
LANGUAGE = LanguageConfig(
    width=C["llm_dim"],
    layers=C["llm_layers"],
    heads=C["llm_heads"],
    kv_heads=C["llm_heads"],
    head_width=C["llm_dim"] // C["llm_heads"],
    mlp_width=C["llm_inter"],
    scan=False,
)


def shapes_of(module):
    state = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    return {path: tuple(leaf.shape) for path, leaf in flatten(state)}


@functools.cache
def tokenizer():
    model = nnx.eval_shape(lambda: ImageTokenizer(ENCODER, TOKENIZER, rngs=Keys(params=0)))
    shapes = shapes_of(model)
    source = peers.lavit_weights("visual_tokenizer")
    table = eva.table(ENCODER.depth, theirs="encoder.") + lavit.tokenizer_encoder(TOKENIZER.merger_depth)
    unused = lambda name: name.startswith(("encoder.norm.", "encoder.head.", "vit_proj."))
    flat = load(shapes, table, source, unused)
    low = peers.lavit_weights("tokenizer_decoder")
    decoder = [e for e in lavit.feature_decoder(TOKENIZER.decoder_depth, "low") if e.ours.startswith("decoder/")]
    flat |= load(shapes, decoder, low, lambda name: name.startswith("unet_"))
    flat["quantizer/count"] = jnp.ones(TOKENIZER.codes)
    return nnx.graphdef(model), unflatten(flat)


def model():
    graph, params = tokenizer()
    return nnx.merge(graph, params)


@functools.cache
def decoder(kind):
    """The feature decoder and conditioner of one of the two published files."""
    pooled = C["unet_dim_2"] if kind == "high" else 0
    shape = ConditionerConfig(C["unet_dim_1"] if pooled else C["unet_dim"], pooled, C["heads"])

    class Both(nnx.Module):
        def __init__(self, rngs):
            self.decoder = ImageTokenizer(ENCODER, TOKENIZER, rngs=rngs).decoder
            self.conditioner = Conditioner(ENCODER.width, ENCODER.num_patches, shape, rngs=rngs)

    abstract = nnx.eval_shape(lambda: Both(Keys(params=0)))
    source = peers.lavit_weights("highres_tokenizer_decoder" if kind == "high" else "tokenizer_decoder")
    flat = load(shapes_of(abstract), lavit.feature_decoder(TOKENIZER.decoder_depth, kind), source)
    return nnx.merge(nnx.graphdef(abstract), unflatten(flat))


def layer(stack, index):
    return jax.tree.map(lambda leaf: leaf[index], stack)


def features():
    return jnp.asarray(FIXTURE["shared/enc/features"])


def keep(mode):
    return FIXTURE[f"{mode}/selector/keep_mask"] > 0.5


def padded(rows, mode):
    """Kept rows [sum, ...] at their patches [B, P, ...]."""
    mask = keep(mode)
    out = np.zeros((*mask.shape, *rows.shape[1:]), rows.dtype)
    out[mask] = rows
    return out


def test_encoder():
    images = FIXTURE["input/image"].transpose(0, 2, 3, 1)
    vit = model().encoder
    x = vit.patch_embed(patchify(jnp.asarray(images), ENCODER.patch_size))
    close(x, "shared/enc/patch_embed")
    cls = jnp.broadcast_to(vit.cls[...], (x.shape[0], 1, x.shape[2]))
    x = jnp.concatenate([cls, x], 1) + vit.positions[...]
    for index in range(ENCODER.depth):
        x = layer(vit.blocks, index)(x)
        close(x, f"shared/enc/block_{index}")
    close(vit(jnp.asarray(images)), "shared/enc/features")
    close(x, "shared/enc/features_with_cls")


def test_selector():
    log_probs = model().selector(features())
    close(log_probs, "shared/selector/log_probs")
    assert (np.asarray(argmax_mask(log_probs)) == keep("argmax")).all()
    sampled = straight_through(log_probs + FIXTURE["sampled/selector/gumbel_noise"])
    assert (np.asarray(sampled) == FIXTURE["sampled/selector/keep_mask"]).all()
    assert (np.asarray(sampled).sum(-1) == FIXTURE["sampled/token_nums"]).all()


@pytest.mark.parametrize("mode", MODES)
def test_merger(mode):
    merger, mask = model().merger, jnp.asarray(FIXTURE[f"{mode}/selector/keep_mask"])
    x, size = features(), ENCODER.num_patches
    source = merger.source_norm(x)
    close(source, "shared/merger/ln_vision")
    lower = np.tril(np.ones((size, size)))
    itself = (mask[:, None] + (1 - mask[:, None]) * np.eye(size)) * lower
    dropped = jnp.broadcast_to(1 - mask[:, None], itself.shape)
    for index in range(TOKENIZER.merger_depth):
        block = layer(merger.blocks, index)
        y = block.norm0(x)
        y = block.causal.with_policy(y, y, itself, 1e-6, 0.0)
        close(y, f"{mode}/merger/block_{index}/causal_attn")
        y = block.cross.with_policy(block.norm1(x + y), source, dropped, 1e-6, 0.0)
        close(y, f"{mode}/merger/block_{index}/cross_attn")
        x = block(x, source, itself, dropped, 1e-6, 0.0)
        close(x, f"{mode}/merger/block_{index}/out")
    close(merger.norm(x), f"{mode}/merger/out_all")
    close(merger.dense(features(), mask), f"{mode}/merger/out_all")
    close(np.asarray(merger.dense(features(), mask))[keep(mode)], f"{mode}/merger/kept")


def test_merger_under_forced_masks():
    cases = {k.split("/")[1] for k in FIXTURE.files if k.startswith("edge_merger/")}
    assert len(cases) == 5
    for case in cases:
        out = model().merger.dense(features(), jnp.asarray(FIXTURE[f"edge_merger/{case}/mask"]))
        close(out, f"edge_merger/{case}/out_all")


@pytest.mark.parametrize("mode", MODES)
def test_kept_rows_alone_are_the_dense_ones(mode):
    """The leak of the softmax reads dropped rows too, so the two renderings differ by it: measured, small."""
    mask = keep(mode)
    out = np.asarray(model().merger.kept(features(), jnp.asarray(mask), ENCODER.num_patches))
    wanted = FIXTURE[f"{mode}/merger/kept"]
    found = np.concatenate([row[: m.sum()] for row, m in zip(out, mask, strict=True)])
    assert np.abs(found - wanted).max() / np.abs(wanted).max() < 0.05


@pytest.mark.parametrize("mode", MODES)
def test_quantizer(mode):
    quantizer, rows = model().quantizer, jnp.asarray(FIXTURE[f"{mode}/merger/kept"])
    pre = quantizer.proj2(jnp.tanh(quantizer.proj1(rows)))
    close(pre, f"{mode}/quant/pre")
    z = quantizer.project(rows)
    close(z, f"{mode}/quant/z_l2norm")
    book = quantizer.codebook[...]
    close((z * z).sum(-1, keepdims=True) + (book * book).sum(-1) - 2 * z @ book.T, f"{mode}/quant/dist")
    ids = np.asarray(quantizer.lookup(z))
    assert (ids == FIXTURE[f"{mode}/quant/code_ids"]).all()
    assert (np.asarray(quantizer.rows(ids)) == FIXTURE[f"{mode}/quant/z_q"]).all()


def test_images_to_codes_in_one_call():
    images = jnp.asarray(FIXTURE["input/image"].transpose(0, 2, 3, 1))
    mask, codes = map(np.asarray, model().encode(images))
    assert (mask == keep("argmax")).all()
    assert (codes[mask] == FIXTURE["argmax/quant/code_ids"]).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["low", "high"])
def test_feature_decoder(kind, mode):
    both, mask = decoder(kind), keep(mode)
    name = f"{mode}/decoder_{kind}"
    z = jnp.asarray(padded(FIXTURE[f"{mode}/quant/z_q"], mode))
    close(np.asarray(both.decoder.inner(z))[mask], f"{name}/in_proj")
    index = model().position_index(jnp.asarray(mask))
    x = both.decoder.inner(z) + both.decoder.positions[...][index]
    valid = jnp.broadcast_to(mask[:, None], (*mask.shape, mask.shape[1]))
    q = jnp.broadcast_to(both.decoder.queries[...], x.shape)
    for i in range(TOKENIZER.decoder_depth):
        block = layer(both.decoder.blocks, i)
        close(block.attention(block.norm0(q)), f"{name}/block_{i}/self_attn")
        y = q + block.attention(block.norm0(q))
        close(block.cross(block.norm1(y), x, valid), f"{name}/block_{i}/cross_attn")
        q = block(q, x, valid.astype(jnp.float32), 0.0)
        close(q, f"{name}/block_{i}/out")
    close(both.decoder.norm(q), f"{name}/norm")
    found = both.decoder(z, index, jnp.asarray(mask, jnp.float32))
    close(found, f"{name}/visual_rec")
    context, pooled = both.conditioner(found)
    close(context, f"{name}/{'prompt_embeds' if kind == 'high' else 'unet_context'}")
    if kind == "high":
        close(pooled, f"{name}/pooled_prompt_embeds")


def test_loss_and_gradients_of_equation_4():
    """lambda = 2, rho = 1/3, ratio per image; straight-through mask and codes; no commitment."""
    graph, params = tokenizer()
    target = features()
    noise = FIXTURE["sampled/selector/gumbel_noise"]

    def loss(params):
        m = nnx.merge(graph, params)
        mask = straight_through(m.selector(target) + noise)
        z = m.quantizer.project(m.merger.dense(target, mask))
        rows = m.quantizer.rows(m.quantizer.lookup(z))
        straight = z + jax.lax.stop_gradient(rows - z)
        hard = jax.lax.stop_gradient(mask)
        found = m.decoder(straight, m.position_index(hard), hard)
        rec, _ = reconstruction_loss(found, target, "cosine")
        ratio = ((1 / 3 - mask.mean(-1)) ** 2).mean()
        batch = (1 / 3 - mask.mean()) ** 2
        commit = (((z - rows) ** 2).mean(-1) * hard).sum() / hard.sum()
        return rec + 2 * ratio, (rec, ratio, batch, commit, (l2_normalize(found) * l2_normalize(target)).sum(-1))

    (total, (rec, ratio, batch, commit, cosine)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    start = "train_eq4_sampled/loss"
    close(rec, f"{start}/rec")
    close(cosine, f"{start}/cos")
    close(ratio, f"{start}/ratio_per_image")
    close(batch, f"{start}/ratio_batch")
    close(commit, f"{start}/commit_mse_unit_beta")
    close(total, f"{start}/total_eq4_per_image")
    flat = dict(flatten(grads))
    table = lavit.tokenizer_encoder(TOKENIZER.merger_depth)
    low = lavit.feature_decoder(TOKENIZER.decoder_depth, "low")
    groups = {"visual_tokenizer": table, "tokenizer_decoder": [e for e in low if e.ours.startswith("decoder/")]}
    checked = 0
    for component, entries in groups.items():
        start = f"train_eq4_sampled/grad/{component}/"
        names = [k.removeprefix(start) for k in FIXTURE.files if k.startswith(start)]
        for name, found in to_theirs(entries, flat.__getitem__, names):
            wanted = FIXTURE[start + name]
            gap = np.abs(found - wanted).max() / np.abs(wanted).max()
            assert gap < 1e-4 or np.abs(wanted).max() < 1e-7, (name, gap)
            checked += 1
    assert checked >= 13


# ---- The language model --------------------------------------------------------------------------------------------


UNIFIED = UnifiedConfig(connector="merger", max_image_tokens=ENCODER.num_patches)


@functools.cache
def unified_params():
    text, visual = IDS["text_vocab"], 2 + C["n_code"]
    abstract = nnx.eval_shape(
        lambda: UnifiedModel(
            ENCODER,
            TOKENIZER,
            LANGUAGE,
            UNIFIED,
            text_rows=text,
            visual_rows=128,
            rngs=Keys(params=0),
        )
    )
    shapes = shapes_of(abstract)
    flat = load(shapes, llama.language(LANGUAGE, text, visual), peers.lavit_weights("llama_model"))
    source = peers.lavit_weights("visual_tokenizer")
    flat |= load(shapes, lavit.visual_weight(TOKENIZER.merger_depth), source, lambda n: not n.startswith("vit_proj"))
    flat |= load(shapes, eva.table(ENCODER.depth, theirs="encoder."), source, lambda n: not n.startswith("encoder.b"))
    return nnx.graphdef(abstract), unflatten(flat)


def unified():
    return nnx.merge(*unified_params())


def logits_of(m, x, positions, mask):
    """Logits [B, T, V] of left-padded embeddings, the padding of the vocabulary cut off."""
    hidden = m.language(x, jnp.asarray(positions), jnp.asarray(mask))
    return np.asarray(hidden @ m.language.head().T)[..., : IDS["first_code"] + C["n_code"]]


def image_blocks(m, mode):
    """What captioning feeds, row by row: [IMG] features [/IMG] as embeddings."""
    rows = m.adapter(m.merger.dense(features(), jnp.asarray(keep(mode), jnp.float32)))
    start, end = (m.language.embed(jnp.array([IDS[k]])) for k in ("IMG", "IMG_END"))
    return [np.concatenate([start, np.asarray(r)[k], end]) for r, k in zip(rows, keep(mode), strict=True)]


def left_pad(blocks, pad, length=None):
    length = length or max(map(len, blocks))
    x = np.stack([np.concatenate([np.repeat(pad[None], length - len(b), 0), b]) for b in blocks])
    mask = np.stack([np.r_[np.zeros(length - len(b), int), np.ones(len(b), int)] for b in blocks])
    return x, mask


def test_captioning_inputs():
    m = unified()
    for mode in MODES:
        rows = np.concatenate([b[1:-1] for b in image_blocks(m, mode)])
        close(rows, f"{mode}/understanding/vit_proj_kept")
    eos = np.asarray(m.language.embed(jnp.array([IDS["eos"]])))[0]
    x, mask = left_pad(image_blocks(m, "sampled"), eos)
    close(x, "llm/caption/inputs_embeds")
    assert (mask == FIXTURE["llm/caption/attention_mask"]).all()


def test_vqa_logits_and_greedy_ids():
    m = unified()
    x, mask = FIXTURE["llm/vqa/inputs_embeds"], FIXTURE["llm/vqa/attention_mask"]
    prompt = np.asarray(m.language.embed(jnp.asarray(FIXTURE["llm/vqa/prompt_ids"])))
    valid = FIXTURE["llm/vqa/prompt_attention_mask"] > 0
    for row in range(len(x)):  # the prompt and the image of each row stand in it, in this order and unchanged
        words = prompt[row][valid[row]]
        block = image_blocks(m, "sampled")[row]
        content = x[row][mask[row] > 0]
        close(_without(content, block), words)
    positions = np.where(mask > 0, np.cumsum(mask, -1) - 1, 1)
    assert (positions == FIXTURE["llm/vqa/position_ids"]).all()
    logits = logits_of(m, jnp.asarray(x), positions, mask)
    close(logits * (mask[..., None] > 0), "llm/vqa/logits_valid_only")
    close(logits[:, -1], "llm/vqa/logits_last")
    # Greedy decoding, in one pass: each id is the likeliest after the ones before it, so decoding gives the same ids.
    ids = FIXTURE["llm/vqa/greedy_ids"]
    steps = ids.shape[1]
    x = np.concatenate([x, np.asarray(m.language.embed(jnp.asarray(ids[:, :-1])))], 1)
    mask = np.concatenate([mask, np.ones((len(mask), steps - 1), int)], 1)
    logits = logits_of(m, jnp.asarray(x), np.where(mask > 0, np.cumsum(mask, -1) - 1, 1), mask)
    assert (logits[:, -steps:, : IDS["text_vocab"]].argmax(-1) == ids).all()


def _without(content, block):
    """`content` without the rows of `block`, which must stand in it as one piece."""
    for at in range(len(content) - len(block) + 1):
        if np.abs(content[at : at + len(block)] - block).max() < 1e-4 * max(1, np.abs(block).max()):
            return np.concatenate([content[:at], content[at + len(block) :]])
    raise AssertionError("the image is not in the row")


def test_drawing_with_guidance():
    """log p = lu + s (lc - lu) before the mask; the free stream is [IMG] and what has been drawn."""
    m = unified()
    scale = float(FIXTURE["llm/t2i/guidance_scale"])
    ids, mask = FIXTURE["llm/t2i/prompt_ids"], FIXTURE["llm/t2i/prompt_attention_mask"]
    mixed, chosen = FIXTURE["llm/t2i/step_mixed"], FIXTURE["llm/t2i/step_ids"]
    steps = mixed.shape[1]
    # One pass over what greedy decoding writes: each id is the likeliest after the ones before it.
    start = np.full((len(ids), 1), IDS["IMG"])
    after, seen = chosen[:, :-1], np.ones((len(ids), steps - 1), int)
    streams = (np.c_[ids, after], np.c_[mask, seen]), (np.c_[start, after], np.c_[np.ones_like(start), seen])
    logp = []
    for tokens, valid in streams:
        positions = np.where(valid > 0, np.cumsum(valid, -1) - 1, 1)
        logits = logits_of(m, m.language.embed(jnp.asarray(tokens)), positions, valid)[:, -steps:]
        logp.append(np.asarray(jax.nn.log_softmax(jnp.asarray(logits), -1)))
    close(logp[0], "llm/t2i/step_cond")
    close(logp[1], "llm/t2i/step_uncond")
    both = logp[1] + scale * (logp[0] - logp[1])
    legal = mixed > -1e29
    close(np.where(legal, both, 0), np.where(legal, mixed, 0))
    assert (np.where(legal, both, -np.inf).argmax(-1) == chosen).all()


# ---- Prompts with images for images ---------------------------------------------------------------------------------

PROMPTS = np.load(peers.DATA / "lavit_prompts_tiny.npz")
PROMPTS_META = json.loads(bytes(PROMPTS["meta_json"]).decode())


def words_tokenizer():
    """A text tokenizer whose word "wN" has the id N, and which starts no text, as LaVIT's."""
    import tokenizers

    names = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, IDS["text_vocab"]))]
    kind = tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")
    words = tokenizers.Tokenizer(kind)
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return text_tokenizer.TextTokenizer({"kind": "tokenizers", "model": words.to_str(), "begin": False})


@functools.cache
def generator():
    """Our generator with the tiny weights of the reference, in the config of an import."""
    sections = {"encoder": ENCODER, "image_tokenizer": TOKENIZER}
    language_sections = sections | {"language": LANGUAGE, "unified": UNIFIED}
    config = resolve.from_json(import_lavit.stage_config("language", language_sections))
    shapes = dict(num_patches=ENCODER.num_patches, codes=TOKENIZER.codes, image_size=ENCODER.image_size)
    header = shapes | dict(positions="order", selection="argmax", fingerprint="")
    words = words_tokenizer()
    data = pipeline.Input(None, words, pipeline.vocabulary_of(header, words), None, header)
    mesh = sharding.make_mesh((1, 1, 1), jax.local_devices()[:1])
    objective = LanguageModeling(config, data)
    model = Model(config, objective, unified_params()[1], mesh, header, words, pathlib.Path())
    of_tokenizer = resolve.from_json(import_lavit.stage_config("tokenizer", sections))
    return Generator(model, batch=5, companions=(LoadedTokenizer(of_tokenizer, *tokenizer(), ""), {}))


@pytest.mark.parametrize("guidance", PROMPTS_META["guidance"])
def test_prompts_with_images_for_images(guidance):
    """Prompts of text and images, greedy, with and without guidance: ids equal those of the reference's code.

    The ids come from `LaVITforGeneration.multimodal_synthesis`, run as it is, with `generate` of transformers 4.33.2,
    the version that the reference names, in float32. Three things around it differ from its defaults: the noise of its
    selector is left out, decoding is greedy, and an image may end after one code. The code makes at most as many ids as
    the prompt has (an error in it), and our images have at most one code per patch, so the ids are compared up to the
    shorter of the two. Its mask leaves ids 0 to 2 and [IMG] legal; the prompts are such that it takes none of them.
    """
    g, images = generator(), PROMPTS["images"]
    asked = [[part if isinstance(part, str) else images[part] for part in p["parts"]] for p in PROMPTS_META["prompts"]]
    prompts = [g.image_prompt_of(parts) for parts in asked]
    found = g.continue_with_image(prompts, Sampling(guidance=guidance, temperature=0))
    tokens, valid, index, features, _ = g._rendered(prompts)
    assert (index < 0).all() and not any(features)  # codes only: the encoder of the language model reads nothing
    for item, ids, row, is_valid in zip(PROMPTS_META["prompts"], found.tolist(), tokens, valid, strict=True):
        assert row[is_valid].tolist() == item["prompt_ids"]
        wanted = item["image_ids"][str(guidance)][: ENCODER.num_patches]
        assert len(wanted) >= 5 and ids[: len(wanted)] == wanted


@pytest.mark.parametrize("mode", MODES)
def test_ids_in_the_vocabulary(mode):
    v = Vocabulary(IDS["text_vocab"], C["n_code"])
    assert (v.start, v.end, v.first_code) == (IDS["IMG"], IDS["IMG_END"], IDS["first_code"])
    real = Vocabulary(32000, 16384)
    assert (real.start, real.end, real.first_code) == (32000, 32001, 32002)
    codes, plain, special = FIXTURE[f"{mode}/quant/code_ids"], [], []
    ends = np.cumsum(FIXTURE[f"{mode}/token_nums"])
    for row in np.split(codes, ends[:-1]):
        ids = v.write_image(np.arange(len(row)), row)
        plain.append(ids)
        special.append(np.r_[v.start, ids, v.end])
    assert (np.concatenate(plain) == FIXTURE[f"{mode}/llm_ids/no_special"]).all()
    assert (np.concatenate(special) == FIXTURE[f"{mode}/llm_ids/with_special"]).all()


# ---- BEiT-2's codebook ----------------------------------------------------------------------------------------------


def test_kmeans_and_ema_updates():
    f = np.load(peers.DATA / "beit2_vq_ema_tiny.npz")
    means, hits = cosine_kmeans(l2_normalize(jnp.asarray(f["kmeans/samples"])), jnp.asarray(f["kmeans/init_means"]))
    close(means, f["kmeans/means_after_10_cosine_iters"])
    assert (np.asarray(hits) == f["kmeans/last_bins"]).all()
    count = jnp.zeros(24)
    for step in range(3):
        z, book = l2_normalize(jnp.asarray(f[f"step{step}/z"])), jnp.asarray(f[f"step{step}/codebook_before"])
        ids = jnp.argmin((z * z).sum(-1, keepdims=True) + (book * book).sum(-1) - 2 * z @ book.T, -1)
        assert (np.asarray(ids) == f[f"step{step}/ids"]).all()
        close(((z - book[ids]) ** 2).mean(), f[f"step{step}/commit_loss"])
        after, count, _ = ema_update(book, count, z, ids, jnp.ones(len(ids)), 0.99)
        close(after, f[f"step{step}/codebook_after"])
        close(count, f[f"step{step}/cluster_size_after"])
