"""Rotations: orthogonal, even, and equal to the dense Kronecker product."""

from __future__ import annotations

import numpy as np
import pytest

from qavp_export.errors import RecipeError
from qavp_export.numerics.rotation import block_rotation, head_rotation, orthogonal, residual_rotation

# Powers of two, Paley I (12, 20, 24, 44, 60, 80), Paley II (28, 36, 76), and orders that neither reaches by a prime
# (odd numbers, 6, 10, 52: 51 and 25 are no primes).
HADAMARD = (1, 2, 4, 8, 64, 128, 12, 20, 24, 28, 36, 44, 60, 76, 80, 96, 160, 576)
OTHER = (3, 5, 6, 7, 10, 52, 67)


@pytest.mark.parametrize("size", [*HADAMARD, *OTHER])
def test_every_size_has_an_orthogonal_matrix(size: int) -> None:
    matrix = orthogonal(size)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-13)


@pytest.mark.parametrize("size", HADAMARD)
def test_a_hadamard_matrix_spreads_one_channel_evenly(size: int) -> None:
    np.testing.assert_allclose(np.abs(orthogonal(size)), size**-0.5, rtol=1e-14)


@pytest.mark.parametrize("width", [96, 576, 4096, 67, 104])
def test_the_residual_rotation_is_its_matrix_and_spreads_outliers(width: int) -> None:
    rotation = residual_rotation(width, seed=3)
    assert rotation.left is not None
    assert rotation.signs is not None
    dense = rotation.signs[:, None] * np.kron(rotation.left, rotation.right)
    # Orthogonal: nothing else brings random vectors back.
    probes = np.random.default_rng(1).standard_normal((width, 8))
    np.testing.assert_allclose(dense @ (dense.T @ probes), probes, atol=1e-12)
    vectors = np.random.default_rng(0).standard_normal((3, width))
    np.testing.assert_allclose(rotation.apply(vectors), vectors @ dense, atol=1e-12)
    np.testing.assert_allclose(rotation.undo(vectors), vectors @ dense.T, atol=1e-12)
    if width in (96, 576, 4096):
        np.testing.assert_allclose(np.abs(dense[0]), width**-0.5, rtol=1e-12)


def test_both_factors_of_a_large_rotation_are_small() -> None:
    for width, sizes in ((4096, (64, 64)), (576, (36, 16)), (5120, (80, 64)), (3584, (56, 64))):
        rotation = residual_rotation(width, seed=0)
        assert rotation.left is not None
        # Both orders have a Hadamard matrix; numbers of similar size keep the product cheap.
        assert sorted((len(rotation.left), len(rotation.right))) == sorted(sizes)


def test_signs_follow_the_seed() -> None:
    one, same, other = (residual_rotation(64, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.matrix(), same.matrix())
    assert (one.matrix() != other.matrix()).any()


def test_the_head_rotation_repeats_for_every_head() -> None:
    rotation = head_rotation(3, 16, seed=5)
    matrix = rotation.matrix()
    first = matrix[:16, :16]
    np.testing.assert_array_equal(matrix, np.kron(np.eye(3), first))
    np.testing.assert_allclose(first @ first.T, np.eye(16), atol=1e-13)
    np.testing.assert_allclose(rotation.undo(matrix), np.eye(48), atol=1e-13)
    # Query heads that share a key/value head read the same rotation.
    np.testing.assert_array_equal(head_rotation(1, 16, seed=5).matrix(), first)


def test_a_block_rotation_behind_a_head_rotation_does_not_undo_it() -> None:
    both = head_rotation(2, 32, seed=0).matrix() @ block_rotation(64, 32).matrix()
    # A Hadamard matrix twice is the identity; with signs between it stays spread: no entry near 1.
    assert np.abs(both).max() < 0.75


def test_the_block_rotation_stays_inside_its_group() -> None:
    matrix = block_rotation(96, 32).matrix()
    np.testing.assert_allclose(matrix, np.kron(np.eye(3), orthogonal(32)), atol=1e-15)
    with pytest.raises(RecipeError, match="group size 64 does not divide 96 channels"):
        block_rotation(96, 64)
