"""A folder of photos, searched by words or by another photo, with FAISS.

    pip install npclip faiss-cpu
    python examples/faiss_search.py PHOTOS "a cat on a sofa" another.jpg [--model MODEL]

A query that is a file is an image, anything else a text. Embeddings are normalised, so inner
products are cosines. Those of a text and an image that fit lie near 0.25 to 0.35, those of two
images near 1: scores of one kind of query can be compared, those of two kinds cannot, and a
threshold for one means nothing for the other. With no threshold something is always found. Choose
it on queries of your own whose answers you know, or take what lies clearly above the collection's
usual score, as `unusual` does.
"""

import argparse
from pathlib import Path

import faiss
import numpy as np

import npclip

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}


def read(paths, embedder):
    """The paths that can be read, and their embeddings float32 [n, D]."""
    good, embeddings = [], []
    for path in paths:
        try:
            embeddings.append(embedder.embed_images(path))
            good.append(path)
        except npclip.ImageError as error:
            print(f"left out: {error}")
    return good, np.array(embeddings, np.float32).reshape(-1, embedder.dimension)


def index_of(embeddings):
    """Exact. For millions, faiss.index_factory(D, "IVF4096,Flat", METRIC_INNER_PRODUCT)."""
    index = faiss.IndexFlatIP(embeddings.shape[1])
    index.add(embeddings)
    return index


def embedded(query, embedder):
    """float32 [1, D], of an image file or a text."""
    is_image = Path(query).is_file()
    return (embedder.embed_images if is_image else embedder.embed_texts)([query])


def unusual(index, query, sigmas=3.0):
    """The score that so many standard deviations lie above the mean over the collection."""
    scores = index.reconstruct_n(0, index.ntotal) @ query[0]
    return float(scores.mean() + sigmas * scores.std())


def main():
    """Print the best photos for each query; those above the threshold have a star."""
    parser = argparse.ArgumentParser()
    parser.add_argument("photos", type=Path)
    parser.add_argument("queries", nargs="+")
    parser.add_argument("--model", default="ViT-B/32")
    parser.add_argument("--top", type=int, default=5)
    args = parser.parse_args()
    embedder = npclip.Embedder(args.model)
    found = sorted(path for path in args.photos.rglob("*") if path.suffix.lower() in EXTENSIONS)
    paths, embeddings = read(found, embedder)
    if not paths:
        raise SystemExit(f"no photo in {args.photos}")
    index = index_of(embeddings)
    for text in args.queries:
        query = embedded(text, embedder)
        scores, rows = index.search(query, min(args.top, len(paths)))
        threshold = unusual(index, query)
        print(f"{text}  (threshold {threshold:.3f})")
        for score, row in zip(scores[0], rows[0], strict=True):
            print(f"{'*' if score >= threshold else ' '} {score:.3f}  {paths[row]}")


if __name__ == "__main__":
    main()
