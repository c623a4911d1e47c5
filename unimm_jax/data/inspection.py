"""A page of what a stage reads: one self-contained HTML file, written before training.

A language stage gets shares, lengths, documents and packed rows; the other stages get images.
"""

import base64
import collections
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from unimm_jax import plotting
from unimm_jax.config import Config
from unimm_jax.data import transforms
from unimm_jax.data.documents import ImageIn, ImageOut, ImageStart, Segment, Special, Text, render
from unimm_jax.data.packing import Example, document_of
from unimm_jax.data.pipeline import ImageRows, Input, PackedRows
from unimm_jax.data.plan import NO_TASK
from unimm_jax.data.records import Records
from unimm_jax.data.sources import DecodedDataset, split_sources
from unimm_jax.data.survey import Survey, chosen, spaced, survey, target_shares, without_task
from unimm_jax.errors import ConfigError
from unimm_jax.text_tokenizer import TextTokenizer

CHECKED = 400  # records of sources that are read for the page
LISTED = 20  # skipped or replaced records that are named
SHOWN_TEXT = 3000  # characters
SIDE = 256  # pixels; larger images are reduced
COLORS = 6  # of the examples of a row
STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c2430;--soft:#5b6675;--line:#dde3ea;--read:#eceff3;--loss:#cfe0ff;
--mark:#2457c5;--bad:#d9622b;--pad:#f4f6f8;
--c0:#bcd2fb;--c1:#ffd3b8;--c2:#bfe6cc;--c3:#e3cdf5;--c4:#f6e2a0;--c5:#b9e5ea}
@media (prefers-color-scheme:dark){:root{--bg:#14181f;--fg:#e4e8ee;--soft:#9aa6b5;--line:#333c48;--read:#272e38;
--loss:#24457f;--mark:#7ba4f5;--bad:#f08a55;--pad:#1d232c;--c0:#2b4a86;--c1:#7b4526;--c2:#24603c;--c3:#58397a;
--c4:#655412;--c5:#1d5c64}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;color:var(--fg);background:var(--bg);max-width:1080px;margin:2rem auto;
padding:0 1rem;overflow-wrap:anywhere}
h1{font-size:1.7rem;line-height:1.25}h3{font-size:1rem;margin:1.2rem 0 .4rem}
.doc h3,.row h3{margin-top:0}h3 small{font-weight:normal}
h2{font-size:1.2rem;margin-top:2.4rem;border-bottom:1px solid var(--line);padding-bottom:.3rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:.4rem 0}
td,th{padding:.15rem 1.2rem .15rem 0;text-align:left;vertical-align:top}td.n,th.n{text-align:right;overflow-wrap:normal}
td.n{white-space:nowrap}
.table .x{min-width:7.6rem}
.facts td:first-child{color:var(--soft);min-width:6rem}.table th{font-size:13px;line-height:1.3;vertical-align:bottom}
small,.note{color:var(--soft)}
.doc,.row{border:1px solid var(--line);border-radius:6px;padding:.6rem .8rem;margin:.7rem 0}
.seq{display:flex;flex-wrap:wrap;gap:4px;align-items:center}
.t{padding:.05rem .35rem;border-radius:4px;background:var(--read);border-bottom:2px solid transparent;max-width:100%;
white-space:pre-wrap}
.t.loss{background:var(--loss);border-bottom-color:var(--mark)}
.t.special{font:13px ui-monospace,monospace;border:1px solid var(--soft)}.t.special.loss{border-color:var(--mark)}
sup{font-size:11px;line-height:1}
figure{margin:0;width:136px;font-size:12px;line-height:1.35}figure img{display:block;width:128px;height:128px;
image-rendering:pixelated;margin-bottom:3px;outline:1px solid var(--line)}
.seq figure{padding:4px;border-radius:4px;background:var(--read);border-bottom:2px solid transparent}
.seq figure.loss{background:var(--loss);border-bottom-color:var(--mark)}
.seq figure.out img{outline:2px dashed var(--bad);outline-offset:-1px}figure.out b{color:var(--bad)}
.images{display:flex;flex-wrap:wrap;gap:12px}
svg{display:block;width:100%;max-width:720px}svg text{font:12px system-ui,sans-serif;fill:var(--soft)}
@media (max-width:600px){svg text{font-size:19px}td,th{padding-right:.6rem}}
.bar{fill:var(--mark)}.bar.long{fill:var(--bad)}.axis{stroke:var(--line)}
.limit{stroke:var(--bad);stroke-width:1.5;stroke-dasharray:4 3}
svg text.limit{fill:var(--bad);stroke:none}
.strip{display:flex;gap:1px;height:1.7rem;font-size:12px;line-height:1.7rem;margin:.3rem 0}
.strip span{min-width:0;overflow:hidden;text-align:center;white-space:nowrap}
.c0{background:var(--c0)}.c1{background:var(--c1)}.c2{background:var(--c2)}
.c3{background:var(--c3)}.c4{background:var(--c4)}.c5{background:var(--c5)}
.pad{background:repeating-linear-gradient(135deg,var(--pad) 0 5px,var(--line) 5px 6px);color:var(--soft)}
.key{display:flex;flex-wrap:wrap;gap:2px 12px;font-size:13px;line-height:1.5;align-items:center}
.box{display:inline-block;width:.8rem;height:.8rem;margin-right:4px;vertical-align:-1px;border:1px solid var(--line)}
"""


def build(config: Config, data: Input, documents: int = 24, rows: int = 6) -> str:
    """The page of a stage.

    Args:
      config: of the stage. data: its opened input.
      documents: number of documents (or images) to show. rows: number of packed rows to show.

    Raises:
      ConfigError: the input is of a kind that the page does not know.
    """
    if isinstance(data.rows, PackedRows):
        body = _language_page(config, data, documents, rows)
    elif isinstance(data.rows, ImageRows) and data.records is not None:
        body = _record_images_page(config, data, data.records, documents)
    elif isinstance(data.rows, ImageRows):
        body = _source_images_page(config, data, documents)
    else:
        raise ConfigError(f"config.objective is {config.objective!r}, whose input is not made of images or packed rows")
    name = html.escape(config.name)
    head = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{name}: data</title><style>{STYLE}</style><h1>What {name} reads</h1>"
    )
    return "\n".join([head, *body, "</html>\n"])


# ---- Parts of pages --------------------------------------------------------------------------------------------------


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """A table of names and values; values are text."""
    rows = "".join(f"<tr><td>{name}</td><td>{html.escape(value)}</td></tr>" for name, value in pairs)
    return f'<table class="facts">{rows}</table>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A table whose first `texts` columns are texts and the others numbers; it scrolls if the window is narrow."""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = ["x" if i < texts else "n" for i in range(len(cells))]
        return "".join(f'<{tag} class="{kind}">{html.escape(cell)}</{tag}>' for kind, cell in zip(kinds, cells))

    body = "".join(f"<tr>{line(cells, 'td')}</tr>" for cells in rows)
    return f'<div class="scroll"><table class="table"><tr>{line(head, "th")}</tr>{body}</table></div>'


def picture(image: np.ndarray, keep: np.ndarray | None = None) -> str:
    """An <img> with the image, uint8 [S, S, 3]; patches outside of `keep`, boolean [P], are faded."""
    image = plotting.enlarged(image)
    side = 1 if keep is None else round(len(keep) ** 0.5)
    size = min(image.shape[0], max(SIDE, 4 * side)) // side * side  # whole patches
    image = transforms.to_pixels(image, size)
    if keep is not None and not keep.all():
        image = plotting.kept_patches(image, keep)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(transforms.encode_png(image)).decode()}">'


def shortened(text: str) -> str:
    """A text as HTML; the end of a very long one is left out."""
    more = len(text) - SHOWN_TEXT
    return html.escape(text[:SHOWN_TEXT]) + (f" <small>… and {more:,} characters</small>" if more > 0 else "")


def describe_tokenizer(tokenizer: TextTokenizer) -> str:
    """One line about a text tokenizer."""
    kind = "tokenizer.json" if tokenizer.payload["kind"] == "tokenizers" else "sentencepiece"
    bos = "none" if tokenizer.bos is None else tokenizer.bos
    return f"{kind}, {tokenizer.vocab_size:,} ids, <s> is {bos}, </s> is {tokenizer.eos}, {tokenizer.fingerprint}"


def listed_sources(header: Mapping[str, Any]) -> list[str]:
    """The sources of records or of a stage, in the order of their numbers."""
    return split_sources(header.get("sources", ""))


# ---- Language stages -------------------------------------------------------------------------------------------------


def _language_page(config: Config, data: Input, documents: int, rows: int) -> list[str]:
    found = survey(data.rows.plan)
    return [
        *summary(config, data, found),
        *lengths(found),
        *document_list(found, documents),
        *row_list(found, rows),
        *dropped_list(found),
    ]


def summary(config: Config, data: Input, found: Survey) -> list[str]:
    """Counts of the records and of the first steps, and the shares of tasks and sources."""
    plan, records = found.plan, found.plan.records
    packing, packed = plan.packing, found.packed
    tokens = sum(found.sizes[example][0] for example in packed)
    per_row = [len(row) for row in found.rows]
    images = [sum(found.sizes[example][1] for example in row) for row in found.rows]
    unused = "; ".join(f"{count:,}: {reason}" for reason, count in plan.unused.items())
    replaced = "; ".join(f"{count:,} {reason}" for reason, count in plan.reasons(plan.first_window().rejected).items())
    per_step = plan.rows_per_step * packing.seq_len
    pairs = [
        ("config", f"{config.name}, seed {config.seed}"),
        ("records", str(records.path)),
        ("number of records", f"{len(records):,}"),
        ("number of images", f"{records.num_images:,}"),
        ("text tokenizer", describe_tokenizer(plan.layout.text_tokenizer)),
        ("records that are never read", unused or "none"),
        ("batch", f"{plan.batch:,} examples per step in {plan.rows_per_step:,} rows of {packing.seq_len:,} tokens"),
        ("fill", f"{tokens / (plan.window * per_step):.1%} of the positions are not padding"),
        ("shown here", f"the first {plan.window:,} steps, which are planned together: {len(packed):,} examples"),
        ("replaced examples", replaced or "none"),
        ("examples per row", f"{np.mean(per_row):.2f} (from {min(per_row)} to {max(per_row)})"),
        ("images per row", f"{np.mean(images):.2f} (from {min(images)} to {max(images)}) of {packing.images_per_row}"),
    ]
    parts = ["<h2>Summary</h2>", facts(pairs), *task_table(found, any(config.data.tasks_end.values()))]
    return [*parts, *source_table(found)]


def task_table(found: Survey, shares_change: bool) -> list[str]:
    """Target and found share, examples and lengths of each task."""
    plan, packed = found.plan, found.packed
    settings, counts = plan.packing.shares(0), collections.Counter(example.task for example in packed)
    lines = []
    for task, share in sorted(target_shares(plan).items(), key=lambda pair: -pair[1]):
        sizes = [found.sizes[example][0] for example in packed if example.task == task] or [0]
        shown = [f"{settings.get(task, 0.0):g}", f"{share:.1%}", f"{counts[task] / len(packed):.1%}"]
        lines.append([task, *shown, f"{counts[task]:,}", f"{np.median(sizes):.0f}", f"{max(sizes):,}"])
    unused = [line[0] for line in lines if line[4] == "0"]
    note = (
        "The target is what the setting gives with these records: each record gets one of the tasks that apply to it."
    )
    if unused:
        note += f" No example is drawn for {', '.join(unused)}."
    if shares_change:
        note += f" The settings change linearly to config.data.tasks_end in pass {plan.packing.epochs}."
    head = ("task", "setting", "target", "found", "examples", "median tokens", "most tokens")
    return ["<h3>Tasks in the first steps</h3>", table(head, lines), f'<p class="note">{html.escape(note)}</p>']


def source_table(found: Survey) -> list[str]:
    """Records and examples of each source."""
    records, packed = found.plan.records, found.packed
    names, per_image = listed_sources(records.header), np.diff(records.kept.ends)
    counts = collections.Counter(int(records.source[example.record]) for example in packed)
    weights = {source.number: f"{source.weight:g}" for source in found.plan.packing.sources}
    lines = []
    for number in sorted(set(np.unique(records.source).tolist()) | set(range(len(names)))):
        mine = records.source == number
        name = names[number] if number < len(names) else f"source {number}"
        weight = [weights.get(number, "not used")] if weights else []
        shown = [f"{int(mine.sum()):,}", f"{int(per_image[mine].sum()):,}", *weight, f"{counts[number]:,}"]
        lines.append([name, *shown, f"{counts[number] / len(packed):.1%}"])
    head = ["source", "records", "images", *(["weight"] if weights else []), "examples", "share"]
    return ["<h3>Sources in the first steps</h3>", table(head, lines)]


def lengths(found: Survey) -> list[str]:
    """The histogram of the lengths of all examples."""
    rejected = [tokens for _, task, tokens, _ in found.rejected if task]
    sizes = np.array([tokens for tokens, _ in found.sizes.values()] + rejected)
    limit = found.plan.packing.seq_len
    long = int((sizes > limit).sum())
    words = (
        f"{len(sizes):,} examples of {sizes.min():,} to {sizes.max():,} tokens, median {np.median(sizes):.0f}, "
        f"mean {sizes.mean():.1f}. {long:,} are longer than a row (config.data.seq_len = {limit:,})"
        + (" and are replaced." if long else ".")
    )
    return ["<h2>Lengths of the examples</h2>", f"<p>{words}</p>", histogram(sizes, limit)]


def histogram(sizes: np.ndarray, limit: int) -> str:
    """An SVG of how many examples have how many tokens, with `limit` marked. Its axis ends at 1.5 · `limit`."""
    width, height, left, right, top, bottom = 640, 220, 8, 20, 30, 26
    longest = int(sizes.max())
    end = min(longest, limit + limit // 2)
    end = max(end, limit) if 3 * longest >= limit else end  # short examples would be one bar beside a far limit
    step = -(-(end + 1) // 48)
    shift = -(limit + 1) % step  # one bar ends at the limit
    counts = np.bincount((np.minimum(sizes, end) + shift) // step)
    scale = (width - left - right) / ((end + shift) // step + 1) / step

    def text(x: float, y: float, words: str, anchor: str, kind: str = "") -> str:
        return f'<text{kind} x="{x:.1f}" y="{y}" text-anchor="{anchor}">{html.escape(words)}</text>'

    parts, base = [], height - bottom
    for i, count in enumerate(counts.tolist()):
        if count:
            tall = max(count / counts.max() * (base - top), 1)
            first, last = max(i * step - shift, 0), (i + 1) * step - shift - 1
            span = f"{first} tokens" if step == 1 else f"{first} to {last} tokens"
            if longest > end and i == len(counts) - 1:
                span = f"{first} tokens and more"
            kind = "bar long" if first > limit else "bar"
            parts.append(
                f'<rect class="{kind}" x="{left + i * step * scale:.1f}" y="{base - tall:.1f}" '
                f'width="{max(step * scale - 1, 0.5):.1f}" height="{tall:.1f}">'
                f"<title>{span}: {count:,} examples</title></rect>"
            )
    parts.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{base}" y2="{base}"/>')
    parts.append(text(left, height - 7, "0", "start"))
    parts.append(text(width - right, height - 7, f"{end:,} tokens" + (" and more" if longest > end else ""), "end"))
    parts.append(text(left, 14, f"most in one bar: {int(counts.max()):,}", "start"))
    name = f"seq_len {limit:,}"
    if limit <= end:
        x = left + (limit + 1 + shift) * scale  # after the examples that just fit
        parts.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 6}" y2="{base}"/>')
        parts.append(text(min(x + 4, width), 14, name, "end" if x > width / 2 else "start", ' class="limit"'))
    else:
        parts.append(text(width - right, 14, f"{name} →", "end", ' class="limit"'))
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Lengths">{"".join(parts)}</svg>'


# ---- Documents -------------------------------------------------------------------------------------------------------


def document_list(found: Survey, limit: int) -> list[str]:
    """Documents with their texts and images, colored by loss."""
    legend = (
        '<p class="seq"><span class="t loss">in the loss</span><span class="t">read only</span>'
        '<span class="t special">[IMG]</span><small>special token</small>'
        "<sup>×0.5</sup><small>loss weight, if it is not 1</small></p>"
        '<p class="note">Faded patches are dropped by the image tokenizer. Images without a dashed frame are read as '
        "features; images with one are <b>generated</b> as codes. An image that is read and colored as in the loss has "
        "its codes as targets. The first token of a document is never in the loss. Hover over a part for its number of "
        "tokens and its weight.</p>"
    )
    shown, total = chosen(found, limit), len(found.packed)
    title = f"<h2>Documents</h2><p>{len(shown)} of {total:,} examples of the first steps; tasks take turns.</p>"
    return [title, legend, *(document(found, example) for example in shown)]


def document(found: Survey, example: Example) -> str:
    """One document as HTML."""
    plan = found.plan
    records, layout = plan.records, plan.layout
    item, segments = records[example.record], document_of(records, example, plan.packing, plan.layout)
    tokens = render(segments, item.texts, item.keep, item.codes, layout)
    weights = tokens.weights.copy()
    weights[:1] = 0.0  # nothing comes before it that could predict it
    parts, at = [], 0
    for segment in segments:
        size = len(render((segment,), item.texts, item.keep, item.codes, layout).ids)
        if size:
            parts.append(_segment(found, example, segment, weights[at : at + size]))
        at += size
    names, number = listed_sources(records.header), int(records.source[example.record])
    about = [item.key, names[number] if number < len(names) else "", f"record {example.record}"]
    about.append(f"{len(weights):,} tokens, {int((weights > 0).sum()):,} in the loss")
    line = html.escape(" · ".join(dict.fromkeys(filter(None, about))))
    return (
        f'<div class="doc"><h3>{html.escape(example.task)} <small>{line}</small></h3>'
        f'<div class="seq">{"".join(parts)}</div></div>'
    )


def _segment(found: Survey, example: Example, segment: Segment, weights: np.ndarray) -> str:
    """One segment of a document as HTML; `weights` are those of its tokens."""
    if isinstance(segment, Special):
        return piece("<s>" if segment.name == "bos" else "</s>", weights, "special")
    if isinstance(segment, ImageStart):
        return piece("[IMG]", weights, "special")
    records = found.plan.records
    item = records[example.record]
    if isinstance(segment, Text):
        return piece(segment.text if isinstance(segment.text, str) else item.texts[segment.text], weights)
    is_out, layout = isinstance(segment, ImageOut), found.plan.layout
    if isinstance(segment, ImageIn) and layout.view_features:
        return _view(found, example, segment, weights)
    keep, kept = item.keep[segment.image], np.zeros(len(item.keep[segment.image]), bool)
    kept[np.flatnonzero(keep)[: layout.max_codes]] = True
    count = int(kept.sum())
    cut = f", {int(keep.sum()) - count} more are cut" if keep.sum() > count else ""
    words = f"<b>generated</b>: {count} codes{cut}" if is_out else f"read: {count} of {len(kept)} patches{cut}"
    codes = " ".join(map(str, item.codes[segment.image][kept].tolist()))
    title = html.escape(f"{_tokens(weights[1:-1])}; codes {codes}")
    kind = ("out" if is_out else "in") + (" loss" if weights[1:-1].max(initial=0) > 0 else "")
    return _figure(picture(records.image(example.record, segment.image), kept), words, kind, title, weights)


def _view(found: Survey, example: Example, segment: ImageIn, weights: np.ndarray) -> str:
    """A view of which all features are read, as HTML."""
    packing = found.plan.packing
    grids = (packing.max_slices, packing.slice_grids) if segment.view else (0, "illume")
    views = found.plan.records.views(example.record, segment.image, packing.image_size, *grids)
    words = f"read: {found.plan.layout.view_features} features"
    words += f" of slice {segment.view} of {len(views) - 1}" if segment.view else ""
    kind = "in" + (" loss" if weights[1:-1].max(initial=0) > 0 else "")
    image = picture(views[segment.view])
    return _figure(image, words, kind, html.escape(_tokens(weights[1:-1])), weights)


def _figure(image: str, words: str, kind: str, title: str, weights: np.ndarray) -> str:
    """[IMG], an image with words below it, and [/IMG]."""
    figure = f'<figure class="{kind}" title="{title}">{image}{words}{_weight(weights[1:-1])}</figure>'
    return piece("[IMG]", weights[:1], "special") + figure + piece("[/IMG]", weights[-1:], "special")


def piece(text: str, weights: np.ndarray, kind: str = "") -> str:
    """A text or a special token as HTML; `weights` are those of its tokens."""
    names = " ".join(filter(None, ["t", kind, "loss" if weights.max(initial=0) > 0 else ""]))
    return f'<span class="{names}" title="{_tokens(weights)}">{shortened(text)}{_weight(weights)}</span>'


def _tokens(weights: np.ndarray) -> str:
    """Number of tokens and their loss weight."""
    count, weight = len(weights), float(weights.max(initial=0))
    words = f"{count} token{'' if count == 1 else 's'}, " + (f"loss weight {weight:g}" if weight else "not in the loss")
    return words + (" (the first token: 0)" if weight and weights[0] == 0 else "")


def _weight(weights: np.ndarray) -> str:
    """The loss weight if it is neither 0 nor 1."""
    weight = float(weights.max(initial=0))
    return "" if weight in (0.0, 1.0) else f" <sup>×{weight:g}</sup>"


# ---- Rows and dropped records ----------------------------------------------------------------------------------------


def row_list(found: Survey, limit: int) -> list[str]:
    """The first packed rows."""
    title = f"<h2>Packed rows</h2><p>The first {min(limit, len(found.rows))} of {len(found.rows):,} rows.</p>"
    legend = (
        '<p class="key"><span><span class="box c0"></span>an example, with its number of tokens</span>'
        '<span><span class="box c1"></span>the next example</span><span><span class="box pad"></span>padding</span>'
        '<span><span class="box"></span>an image slot that is not used</span></p>'
    )
    return [title, legend, *(packed_row(found, number) for number in range(min(limit, len(found.rows))))]


def packed_row(found: Survey, number: int) -> str:
    """One row: a strip of its examples, its image slots, and the list of its examples."""
    packing, row = found.plan.packing, found.rows[number]
    strip, slots, names = [], [], []
    for i, example in enumerate(row):
        (tokens, images), color = found.sizes[example], f"c{i % COLORS}"
        about = html.escape(f"{example.task}, {tokens} tokens, {images} image{'' if images == 1 else 's'}")
        strip.append(f'<span class="{color}" style="flex:{tokens} 1 0" title="{about}">{tokens}</span>')
        slots += [f'<span class="box {color}"></span>'] * images
        names.append(f'<span><span class="box {color}"></span>{html.escape(example.task)} {tokens}</span>')
    used = sum(found.sizes[example][0] for example in row)
    if padding := packing.seq_len - used:
        about = f"padding, {padding} tokens"
        strip.append(f'<span class="pad" style="flex:{padding} 1 0" title="{about}">{padding}</span>')
    free = '<span class="box"></span>' * (packing.images_per_row - len(slots))
    head = f"{len(row)} examples, {used:,} of {packing.seq_len:,} tokens, {packing.seq_len - used:,} padding"
    return (
        f'<div class="row"><h3>Row {number} <small>{head}</small></h3><div class="strip">{"".join(strip)}</div>'
        f'<div class="key">{"".join(names)}</div><div class="note">{len(slots)} of {packing.images_per_row} image '
        f"slots are used {''.join(slots)}{free}</div></div>"
    )


def dropped_list(found: Survey) -> list[str]:
    """Records that are skipped, never read or replaced, with reasons."""
    plan = found.plan
    records, parts = plan.records, ["<h2>Skipped and replaced records</h2>"]
    if "places" in records.header:
        places = records.header["places"]
        skipped = f"{places - len(records):,} of {places:,} records" if places > len(records) else "no record"
        parts.append(f"<p>When the records were written, pretokenize skipped {skipped} of the sources.</p>")
    counts = [(why, f"{n:,} records", "never read") for why, n in plan.unused.items()]
    counts += [
        (why, f"{n:,} examples", "replaced by others") for why, n in plan.reasons(plan.first_window().rejected).items()
    ]
    if not counts:
        return [*parts, "<p>Every record is read, and no example of the first steps is replaced.</p>"]
    parts.append(table(("reason", "number", "what happens"), counts, texts=3))
    lines = [(records[i].key, NO_TASK, "", "", "") for i in without_task(plan, LISTED)]
    packing = plan.packing
    for record, task, tokens, images in found.rejected[: 2 * LISTED - len(lines)]:
        long = tokens > packing.seq_len
        reason = f"longer than {packing.seq_len} tokens" if long else f"more than {packing.images_per_row} input images"
        lines.append((records[record].key, reason if task else NO_TASK, task, f"{tokens:,}", f"{images}"))
    parts.append(f"<p>The first {len(lines)} of them:</p>")
    return [*parts, table(("record", "reason", "task", "tokens", "input images"), lines, texts=3)]


# ---- Stages that read images -----------------------------------------------------------------------------------------


def _source_images_page(config: Config, data: Input, limit: int) -> list[str]:
    """Images after preprocessing with their captions, and the records that are skipped."""
    datasets: list[DecodedDataset] = data.rows.sources
    usable, checked = [], 0
    for dataset in datasets:
        places = spaced(len(dataset), max(CHECKED // len(datasets), 1))
        checked += len(places)
        usable += [(dataset.source.key(i), item) for i in places if (item := dataset.load(i)) is not None]
    longest = config.model["text_tower"].max_length if data.text_tokenizer else 0
    texts = [text for _, item in usable for text in (*item.record.captions, *item.record.prompts)]
    pairs = [("config", f"{config.name}, seed {config.seed}")]
    pairs += [("source", f"{dataset.source.name}, {len(dataset):,} records") for dataset in datasets]
    side, cut = config.data.image_size, "the centered square, " if config.data.fit == "crop" else ""
    pairs.append(("images", f"{cut}resized to {side} × {side} pixels"))
    pairs.append(("held out", f"{config.data.held_out:g} of the records of sources without a test split"))
    if data.text_tokenizer and texts:
        counts = [len(data.text_tokenizer.encode(text)) for text in texts]
        long = sum(count > longest for count in counts)
        pairs.append(("text tokenizer", describe_tokenizer(data.text_tokenizer)))
        pairs.append(
            ("captions", f"{np.mean(counts):.1f} tokens on average, at most {max(counts)}; {long} are cut at {longest}")
        )
    total = sum(len(dataset) for dataset in datasets)
    pairs.append(("read for this page", f"{checked:,} of {total:,} records; {len(usable):,} can be used"))
    figures = []
    for i in spaced(len(usable), limit):
        key, item = usable[i]
        words = [shortened(text) for text in (*item.record.captions, *item.record.prompts)[:3]]
        images = "".join(picture(pixels) for pixels in item.pixels[:2])
        figures.append(f"<figure>{images}{'<br>'.join(words)} <small>{html.escape(key)}</small></figure>")
    reasons = [(dataset.source.key(i), reason) for dataset in datasets for i, reason in sorted(dataset.invalid.items())]
    parts = ["<h2>Summary</h2>", facts(pairs), "<h2>Images after preprocessing</h2>"]
    parts += [f'<div class="images">{"".join(figures)}</div>', "<h2>Skipped records</h2>"]
    if not reasons:
        return [*parts, "<p>Of the records that were read, none is skipped.</p>"]
    parts.append(f"<p>Of the records that were read, {len(reasons)} are skipped; the first are:</p>")
    return [*parts, table(("record", "reason"), reasons[: 2 * LISTED], texts=2)]


def _record_images_page(config: Config, data: Input, records: Records, limit: int) -> list[str]:
    """The images of records with the patches that have codes."""
    images = data.rows.sources[0]
    pairs = [
        ("config", f"{config.name}, seed {config.seed}"),
        ("records", str(records.path)),
        ("sources", "; ".join(listed_sources(records.header))),
        ("number of records", f"{len(records):,}"),
        ("number of images", f"{len(images):,}"),
        ("codes per image", f"{np.mean(records.kept.values):.2f} of {records.header['num_patches']} patches"),
    ]
    figures = []
    for i in spaced(len(images), limit):
        item, (record, _) = images[i], records.image_place(i)
        codes = " ".join(map(str, item["codes"][item["keep"]].tolist()))
        words = f"codes {codes} <small>{html.escape(records[record].key)}</small>"
        figures.append(f"<figure>{picture(item['images'], item['keep'])}{words}</figure>")
    note = '<p class="note">Faded patches are dropped by the image tokenizer and have no code.</p>'
    parts = ["<h2>Summary</h2>", facts(pairs), "<h2>Images and their codes</h2>", note]
    return [*parts, f'<div class="images">{"".join(figures)}</div>']
