"""Structure factors of atoms, and how they change with the atoms, compiled by Numba.

Where a fit ends must be exact, what leads it there need not be: structure factors are summed in
double precision, derivatives are kept in single precision, half the memory that a step reads over
and over.

Shape legend: A atoms, G nodes of the reciprocal lattice, Z atomic numbers from 0.
"""

import math

import numpy as np
from numpy.typing import NDArray

from featurization.kernel import compiled

FloatArray = NDArray[np.float64]
SingleArray = NDArray[np.float32]
IndexArray = NDArray[np.int64]


@compiled
def waves(
    hkl_G3: IndexArray, place_A3: FloatArray, number_A: FloatArray, factors_ZG: FloatArray
) -> tuple[FloatArray, FloatArray, SingleArray]:
    """Structure factors F = Σ f exp(2πi h·x), and each atom's part in them.

    Args:
        place_A3: fractional.
        number_A: electrons, ≥ 0; f is linear between whole ones.
        factors_ZG: form factors at the nodes, in electrons.

    Returns:
        (G,) real and imaginary parts of F; (A, 4, G) f cos 2πh·x, f sin 2πh·x, and both with ∂f/∂Z
        in the place of f.
    """
    atoms, nodes = len(place_A3), len(hkl_G3)
    real_G, imaginary_G = np.zeros(nodes), np.zeros(nodes)
    part_A4G = np.empty((atoms, 4, nodes), dtype=np.float32)
    most = 0
    for g in range(nodes):
        for axis in range(3):
            most = max(most, abs(hkl_G3[g, axis]))
    cos, sin = np.empty((3, 2 * most + 1)), np.empty((3, 2 * most + 1))
    for a in range(atoms):
        for axis in range(3):
            for index in range(-most, most + 1):
                angle = 2 * math.pi * (index * place_A3[a, axis])
                cos[axis, index + most] = math.cos(angle)
                sin[axis, index + most] = math.sin(angle)
        lower = min(int(number_A[a]), len(factors_ZG) - 2)
        above = number_A[a] - lower
        last_h = last_k = -1
        c_hk = s_hk = 0.0
        for g in range(nodes):
            h, k, m = hkl_G3[g, 0] + most, hkl_G3[g, 1] + most, hkl_G3[g, 2] + most
            if h != last_h or k != last_k:  # seldom: nodes are in order of their indices
                c_hk = cos[0, h] * cos[1, k] - sin[0, h] * sin[1, k]
                s_hk = cos[0, h] * sin[1, k] + sin[0, h] * cos[1, k]
                last_h, last_k = h, k
            c = c_hk * cos[2, m] - s_hk * sin[2, m]
            s = c_hk * sin[2, m] + s_hk * cos[2, m]
            least = factors_ZG[lower, g]
            rise = factors_ZG[lower + 1, g] - least
            factor = least + above * rise
            real_G[g] += factor * c
            imaginary_G[g] += factor * s
            part_A4G[a, 0, g] = factor * c
            part_A4G[a, 1, g] = factor * s
            part_A4G[a, 2, g] = rise * c
            part_A4G[a, 3, g] = rise * s
    return real_G, imaginary_G, part_A4G


@compiled
def derivatives(
    node_3G: SingleArray, u_G: SingleArray, v_G: SingleArray, part_A4G: SingleArray, unknowns: int
) -> SingleArray:
    """How |F| changes with the atoms.

    Args:
        node_3G: indices h.
        u_G, v_G: cos and sin of the phase of F.
        part_A4G: of `waves`.
        unknowns: of an atom: 3 for its place alone, 4 for its electrons, too.

    Returns:
        (unknowns × A, G) ∂|F|/∂x of all atoms, then of y, of z, of Z.
    """
    atoms, _, nodes = part_A4G.shape
    change_JG = np.empty((unknowns * atoms, nodes), dtype=np.float32)
    turn_G = np.empty(nodes, dtype=np.float32)
    turn = np.float32(2 * math.pi)
    for a in range(atoms):
        c_G, s_G = part_A4G[a, 0], part_A4G[a, 1]
        for g in range(nodes):
            turn_G[g] = turn * (v_G[g] * c_G[g] - u_G[g] * s_G[g])
        for axis in range(3):
            for g in range(nodes):
                change_JG[axis * atoms + a, g] = turn_G[g] * node_3G[axis, g]
        if unknowns == 4:
            c_G, s_G = part_A4G[a, 2], part_A4G[a, 3]
            for g in range(nodes):
                change_JG[3 * atoms + a, g] = u_G[g] * c_G[g] + v_G[g] * s_G[g]
    return change_JG
