"""Photos that show the same: copies, resized, cropped a little, saved again.

    pip install npclip
    python examples/find_duplicates.py PHOTOS [--threshold 0.97] [--model MODEL]

Prints groups, the largest file of each first, and changes nothing. The threshold is a cosine: where
copies end and photos of one scene begin depends on the collection, so look before you delete.
"""

import argparse
from pathlib import Path

import numpy as np

import npclip

BLOCK = 4096  # rows compared at a time: memory is BLOCK x photos x 4 bytes


def embed(paths, embedder):
    """Those that can be read, and float32 [n, D]."""
    good, rows = [], []
    for path in paths:
        try:
            rows.append(embedder.embed_images(path))
            good.append(path)
        except npclip.ImageError:
            continue  # not an image
    return good, np.array(rows, np.float32).reshape(-1, embedder.dimension)


def groups(embeddings, threshold):
    """Lists of rows that are connected by cosines of at least threshold: union-find."""
    parent = list(range(len(embeddings)))

    def root(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for first in range(0, len(embeddings), BLOCK):
        near = embeddings[first : first + BLOCK] @ embeddings.T >= threshold
        for i, j in np.argwhere(near):
            parent[root(first + i)] = root(j)
    found = {}
    for i in range(len(parent)):
        found.setdefault(root(i), []).append(i)
    return [rows for rows in found.values() if len(rows) > 1]


def main():
    """Print the groups."""
    parser = argparse.ArgumentParser()
    parser.add_argument("photos", type=Path)
    parser.add_argument("--threshold", type=float, default=0.97)
    parser.add_argument("--model", default="ViT-B/32")
    args = parser.parse_args()
    embedder = npclip.Embedder(args.model)
    files = sorted(path for path in args.photos.rglob("*") if path.is_file())
    paths, embeddings = embed(files, embedder)
    for rows in groups(embeddings, args.threshold):
        for path in sorted((paths[row] for row in rows), key=lambda p: -p.stat().st_size):
            print(path)
        print()


if __name__ == "__main__":
    main()
