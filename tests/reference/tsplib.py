"""A reader of TSPLIB's symmetric instances (Reinelt 1991): the distance matrix as the library defines it."""

import math

import numpy as np

LAYOUTS = {
    "UPPER_ROW": lambda n: np.triu_indices(n, 1),
    "UPPER_DIAG_ROW": lambda n: np.triu_indices(n),
    "LOWER_ROW": lambda n: np.tril_indices(n, -1),
    "LOWER_DIAG_ROW": lambda n: np.tril_indices(n),
    "FULL_MATRIX": lambda n: np.indices((n, n)).reshape(2, -1),
}


def distances(text):
    """Whole-number distances ``(n, n)`` of an instance given as text."""
    head, body = {}, {}
    section = None
    for line in text.splitlines():
        line = line.strip()
        if not line or line == "EOF":
            continue
        if line.endswith("_SECTION"):
            section = line.removesuffix("_SECTION")
            body[section] = []
        elif section is None:
            key, _, value = line.partition(":")
            head[key.strip()] = value.strip()
        else:
            body[section] += line.split()
    n = int(head["DIMENSION"])
    if head["EDGE_WEIGHT_TYPE"] == "EXPLICIT":
        return _explicit(n, head["EDGE_WEIGHT_FORMAT"], np.array(body["EDGE_WEIGHT"], float))
    points = np.array(body["NODE_COORD"], float).reshape(n, 3)[:, 1:]
    return {"EUC_2D": _euclidean, "ATT": _att, "GEO": _geographic}[head["EDGE_WEIGHT_TYPE"]](points)


def _explicit(n, layout, weights):
    matrix = np.zeros((n, n))
    rows, columns = LAYOUTS[layout](n)
    matrix[rows, columns] = weights
    matrix[columns, rows] = weights
    return matrix


def _norm(points):
    return np.linalg.norm(points[:, None] - points, axis=-1)


def _euclidean(points):
    return np.floor(_norm(points) + 0.5)


def _att(points):
    real = _norm(points) / math.sqrt(10)
    near = np.floor(real + 0.5)
    return np.where(near < real, near + 1, near)


def _geographic(points):
    degrees = np.trunc(points)
    latitude, longitude = (3.141592 * (degrees + 5 * (points - degrees) / 3) / 180).T
    q1 = np.cos(longitude[:, None] - longitude)
    q2 = np.cos(latitude[:, None] - latitude)
    q3 = np.cos(latitude[:, None] + latitude)
    distance = np.trunc(6378.388 * np.arccos(np.clip(0.5 * ((1 + q1) * q2 - (1 - q1) * q3), -1, 1)) + 1)
    np.fill_diagonal(distance, 0)
    return distance
