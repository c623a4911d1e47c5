"""The layout of token ids: text | [IMG] [/IMG] | image codes | patch positions | padding.

LaVIT appends its ids to the text vocabulary in the same order (32000, 32001, 32002 + k). Patch positions exist with
`positions="grid"` only, where each kept token is a pair (position, code). No other file computes id offsets.
"""

import dataclasses

import numpy as np

ROW_MULTIPLE = 128  # the number of visual rows is padded to a multiple of this, to be divisible over a mesh

TEXT, START, END, CODE, POSITION, PADDING = range(6)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Token ids of the language model.

    Attributes:
      text_rows: number of text ids.
      codes: number of image codes.
      num_position_ids: number of patch position ids; 0 without position ids.
    """

    text_rows: int
    codes: int
    num_position_ids: int = 0

    @property
    def start(self) -> int:
        """Id of [IMG], which starts an image."""
        return self.text_rows

    @property
    def end(self) -> int:
        """Id of [/IMG], which ends an image."""
        return self.text_rows + 1

    @property
    def first_code(self) -> int:
        """Id of image code 0."""
        return self.text_rows + 2

    @property
    def first_position(self) -> int:
        """Id of patch position 0."""
        return self.first_code + self.codes

    @property
    def visual_rows(self) -> int:
        """Number of visual rows of embedding and head, padding included."""
        used = 2 + self.codes + self.num_position_ids
        return -(-used // ROW_MULTIPLE) * ROW_MULTIPLE

    @property
    def size(self) -> int:
        """Number of rows of embedding and head, padding included."""
        return self.text_rows + self.visual_rows

    def kinds(self) -> np.ndarray:
        """The kind of each id, int8 [size]: TEXT, START, END, CODE, POSITION or PADDING."""
        kinds = np.full(self.size, PADDING, np.int8)
        kinds[: self.text_rows] = TEXT
        kinds[self.start], kinds[self.end] = START, END
        kinds[self.first_code : self.first_position] = CODE
        kinds[self.first_position : self.first_position + self.num_position_ids] = POSITION
        return kinds

    def place_features(self, patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions of an input image, without [IMG] and [/IMG].

        Features are in raster order; with position ids, each follows the id of its patch position.

        Args:
          patches: patch indices of the kept tokens, ascending.

        Returns:
          (ids int32, feature index int32), of equal length. The feature index is -1 where there is no feature; the id
          where there is one is [IMG].
        """
        rows = np.arange(len(patches), dtype=np.int32)
        ids = np.full(len(patches), self.start, np.int32)
        if not self.num_position_ids:
            return ids, rows
        position_ids = patches.astype(np.int32) + self.first_position
        return np.stack([position_ids, ids], 1).reshape(-1), np.stack([np.full_like(rows, -1), rows], 1).reshape(-1)

    def write_image(self, patches: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Ids of a generated image, int32, without [IMG] and [/IMG].

        Codes are in raster order; with position ids, each follows the id of its patch position.

        Args:
          patches: patch indices of the kept tokens, ascending.
          codes: codes of these patches.
        """
        codes = codes.astype(np.int32) + self.first_code
        if not self.num_position_ids:
            return codes
        return np.stack([patches.astype(np.int32) + self.first_position, codes], 1).reshape(-1)

    def read_image(self, ids: np.ndarray, num_patches: int) -> tuple[np.ndarray, np.ndarray]:
        """The inverse of `write_image`: (codes int32 [P], keep boolean [P]) with P = `num_patches`.

        Ids that are neither codes nor positions are skipped. Without position ids, codes fill the first patches in
        order, since only their order is known (LaVIT); codes beyond the last patch are dropped.
        """
        codes, keep = np.zeros(num_patches, np.int32), np.zeros(num_patches, bool)
        patch = -1
        for token in np.asarray(ids).tolist():
            if self.first_position <= token < self.first_position + self.num_position_ids:
                patch = token - self.first_position
            elif self.first_code <= token < self.first_position:
                if not self.num_position_ids:
                    patch += 1
                if 0 <= patch < num_patches:
                    codes[patch], keep[patch] = token - self.first_code, True
        return codes, keep
