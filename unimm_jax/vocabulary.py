"""The token layout, in one object: text | [IMG] [/IMG] | visual codes | patch positions | padding.

LaVIT appends ids to the text vocabulary in this order (32000, 32001, 32002 + k). Patch positions exist in the `grid`
variant only, where each kept token is written as (position, code). Nobody else knows an offset.
"""

import dataclasses

import numpy as np

ROW_MULTIPLE = 128  # visual rows are padded to a multiple of this, so that they divide over any mesh

TEXT, START, END, CODE, POSITION, PADDING = range(6)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Ids of everything the language model reads and writes.

    Attributes:
      text: number of text ids.
      codes: number of visual codes.
      patches: number of patch positions with ids of their own (grid variant), or 0.
    """

    text: int
    codes: int
    patches: int = 0

    @property
    def start(self) -> int:
        """[IMG]."""
        return self.text

    @property
    def end(self) -> int:
        """[/IMG]."""
        return self.text + 1

    @property
    def first_code(self) -> int:
        """Id of visual code 0."""
        return self.text + 2

    @property
    def first_position(self) -> int:
        """Id of patch position 0."""
        return self.first_code + self.codes

    @property
    def visual_rows(self) -> int:
        """Rows of the visual part of embedding and head, padding included."""
        used = 2 + self.codes + self.patches
        return -(-used // ROW_MULTIPLE) * ROW_MULTIPLE

    @property
    def size(self) -> int:
        """All rows, padding included."""
        return self.text + self.visual_rows

    def kinds(self) -> np.ndarray:
        """What each id is: int8 [size] of TEXT, START, END, CODE, POSITION, PADDING."""
        kinds = np.full(self.size, PADDING, np.int8)
        kinds[: self.text] = TEXT
        kinds[self.start], kinds[self.end] = START, END
        kinds[self.first_code : self.first_position] = CODE
        kinds[self.first_position : self.first_position + self.patches] = POSITION
        return kinds

    def place_features(self, patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A picture to be read, without [IMG] and [/IMG]: (ids, which feature row stands there or -1), int32 both.

        Features in raster order, in the grid variant each after the id of its place; an id under a feature is [IMG]'s.

        Args:
          patches: patch indices of the kept tokens, ascending.
        """
        rows = np.arange(len(patches), dtype=np.int32)
        ids = np.full(len(patches), self.start, np.int32)
        if not self.patches:
            return ids, rows
        places = patches.astype(np.int32) + self.first_position
        return np.stack([places, ids], 1).reshape(-1), np.stack([np.full_like(rows, -1), rows], 1).reshape(-1)

    def write_image(self, patches: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Ids of a picture without [IMG] and [/IMG]: codes in raster order, in the grid variant each after its place.

        Args:
          patches: patch indices of the kept tokens, ascending; `codes`: their codes.
        """
        codes = codes.astype(np.int32) + self.first_code
        if not self.patches:
            return codes
        return np.stack([patches.astype(np.int32) + self.first_position, codes], 1).reshape(-1)

    def read_image(self, ids: np.ndarray, patches: int) -> tuple[np.ndarray, np.ndarray]:
        """The inverse of `write_image`: (codes int32 [patches], keep boolean [patches]).

        Ids that are not visual are skipped. Without position ids the codes fill the patches in order, so that only
        their order carries over (LaVIT); more codes than patches are cut.
        """
        codes, keep = np.zeros(patches, np.int32), np.zeros(patches, bool)
        place = -1
        for token in np.asarray(ids).tolist():
            if self.first_position <= token < self.first_position + self.patches:
                place = token - self.first_position
            elif self.first_code <= token < self.first_position:
                if not self.patches:
                    place += 1
                if 0 <= place < patches:
                    codes[place], keep[place] = token - self.first_code, True
        return codes, keep
