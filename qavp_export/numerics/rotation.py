"""Orthogonal rotations that spread outlier channels before quantization: the reference (NumPy, float64).

Source: QuaRot (Ashkboos et al., 2024), rotations R1, R2 and R4. Hadamard matrices: Sylvester's doubling and Paley's two
constructions (Paley, "On orthogonal matrices", 1933).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qavp_export.errors import RecipeError

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Rotation:
    """`x -> (x * signs) (left (x) right)` on vectors of `width` channels, orthogonal.

    The Kronecker product is never built: a vector becomes a matrix `[width / b, b]`, which `right [b, b]` multiplies
    from the right and `left`, transposed, from the left. Without `left` the rotation is block-diagonal.

    Attributes:
        width: Channels.
        right: Orthogonal `[b, b]` float64; b divides `width`.
        left: Orthogonal `[width / b, width / b]` float64, or None for the identity.
        signs: +1 or -1 `[width]` float64, or None for all +1. They come first.
        signs_after: The same behind the product.
    """

    width: int
    right: Float64
    left: Float64 | None = None
    signs: Float64 | None = None
    signs_after: Float64 | None = None

    def apply(self, vectors: npt.NDArray[np.floating]) -> Float64:
        """Rotates vectors along the last axis.

        Args:
            vectors: `[..., width]`.

        Returns:
            `[..., width]` float64.
        """
        values = np.asarray(vectors, np.float64)
        if self.signs is not None:
            values = values * self.signs
        block = len(self.right)
        grid = values.reshape(*values.shape[:-1], self.width // block, block) @ self.right
        if self.left is not None:
            grid = self.left.T @ grid
        rotated = grid.reshape(values.shape)
        return rotated if self.signs_after is None else rotated * self.signs_after

    def undo(self, vectors: npt.NDArray[np.floating]) -> Float64:
        """Turns rotated vectors back; see `apply`."""
        values = np.asarray(vectors, np.float64)
        if self.signs_after is not None:
            values = values * self.signs_after
        block = len(self.right)
        grid = values.reshape(*values.shape[:-1], self.width // block, block) @ self.right.T
        if self.left is not None:
            grid = self.left @ grid
        turned = grid.reshape(values.shape)
        return turned if self.signs is None else turned * self.signs

    def matrix(self) -> Float64:
        """Returns the rotation as one matrix `[width, width]`: `apply(x) = x @ matrix`."""
        return self.apply(np.eye(self.width))


def residual_rotation(width: int, seed: int) -> Rotation:
    """R1: a Hadamard rotation of the residual stream with random signs.

    Args:
        width: Channels of the residual stream.
        seed: Seed of the signs.

    Returns:
        A rotation in two factors of similar size, so that it costs a vector `width * (a + b)` products.
    """
    odd = width // (width & -width)
    candidates = [size for size in range(1, width + 1) if width % size == 0 and (size % odd == 0)]
    rows = min(candidates, key=lambda size: (not _is_hadamard_order(size), size + width // size))
    signs = _signs(width, seed)
    return Rotation(width, right=orthogonal(width // rows), left=orthogonal(rows), signs=signs)


def head_rotation(heads: int, head_dim: int, seed: int) -> Rotation:
    """R2: one Hadamard rotation for every head of the attention's values, random signs behind it.

    The signs keep it from cancelling against a block rotation of the same size that follows.

    Args:
        heads: Heads.
        head_dim: Channels of each head.
        seed: Seed of the signs: the same for the key/value heads and the query heads that read them.
    """
    signs = np.tile(_signs(head_dim, seed + 1), heads)
    return Rotation(heads * head_dim, right=orthogonal(head_dim), signs_after=signs)


def block_rotation(width: int, group_size: int) -> Rotation:
    """R4: one Hadamard block for each quantization group.

    Raises:
        RecipeError: `group_size` does not divide `width`.
    """
    if group_size < 1 or width % group_size:
        raise RecipeError(f"group size {group_size} does not divide {width} channels")
    return Rotation(width, right=orthogonal(group_size))


def orthogonal(size: int) -> Float64:
    """Returns an orthogonal matrix that spreads one channel over all as evenly as is known.

    Returns:
        A Hadamard matrix over `sqrt(size)` where one of that order can be built; else the Kronecker product of a fixed
        random orthogonal matrix and a Hadamard matrix.
    """
    base, doublings = _decompose(size)
    if _has_paley(base):
        matrix = _paley(base)
    else:
        odd = base // (base & -base)
        matrix = _kron(_random_orthogonal(odd), _sylvester((base // odd).bit_length() - 1))
    return _kron(matrix, _sylvester(doublings))


def _kron(left: Float64, right: Float64) -> Float64:
    return np.asarray(np.kron(left, right), np.float64)


def _decompose(size: int) -> tuple[int, int]:
    """Returns the smallest order that Paley's constructions have and the doublings that lead from it to `size`."""
    odd = size // (size & -size)
    doublings = (size // odd).bit_length() - 1
    for count in range(doublings + 1):
        if _has_paley(odd << count):
            return odd << count, doublings - count
    return size, 0


def _is_hadamard_order(size: int) -> bool:
    return _has_paley(_decompose(size)[0])


def _sylvester(doublings: int) -> Float64:
    matrix: Float64 = np.ones((1, 1))
    for _ in range(doublings):
        matrix = np.kron(matrix, np.array([[1.0, 1.0], [1.0, -1.0]])) * 2**-0.5
    return matrix


def _has_paley(order: int) -> bool:
    """Whether an order is 1, or a multiple of 4 that is `q + 1` or, for q = 1 (mod 4), `2 (q + 1)` of a prime q."""
    return order == 1 or (order % 4 == 0 and (_is_prime(order - 1) or (order % 8 == 4 and _is_prime(order // 2 - 1))))


def _paley(order: int) -> Float64:
    """Returns a Hadamard matrix over `sqrt(order)` of an order that Paley's constructions have."""
    if order == 1:
        return np.ones((1, 1))
    if _is_prime(order - 1):
        core = np.eye(order) + _bordered(order - 1, -1)
    else:
        plus, minus = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
        core = np.kron(_bordered(order // 2 - 1, 1), plus) + np.kron(np.eye(order // 2), minus)
    matrix: Float64 = core / np.sqrt(order)
    return matrix


def _bordered(prime: int, corner: int) -> Float64:
    """Returns the Jacobsthal matrix of a prime with a border of ones, `corner` times ones on the left."""
    residues = {value * value % prime for value in range(1, prime)}
    character = np.array([0] + [1 if value in residues else -1 for value in range(1, prime)])
    matrix = np.zeros((prime + 1, prime + 1))
    matrix[0, 1:], matrix[1:, 0] = 1, corner
    matrix[1:, 1:] = character[(np.arange(prime)[:, None] - np.arange(prime)) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _random_orthogonal(size: int) -> Float64:
    draw = np.random.Generator(np.random.PCG64(size)).standard_normal((size, size))
    factor, triangle = np.linalg.qr(draw)
    matrix: Float64 = factor * np.sign(np.diag(triangle))
    return matrix


def _signs(width: int, seed: int) -> Float64:
    # A named bit generator: NumPy may change what default_rng draws.
    return np.random.Generator(np.random.PCG64(seed)).choice([-1.0, 1.0], width)
