"""CLIP embeddings as a step of a scikit-learn Pipeline, with cross-validation and a grid search.

    pip install npclip scikit-learn
    python examples/scikit_learn_pipeline.py PHOTOS [MODEL]

PHOTOS has a folder per class: PHOTOS/cat/1.jpg, PHOTOS/dog/2.jpg ... MODEL is a name of
`npclip models` or a checkpoint file.
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

import npclip


class ClipEmbedder(TransformerMixin, BaseEstimator):
    """Images (paths, bytes, PIL images, arrays), or texts, to float32 [B, dimension].

    The parameters are plain values, so that clone() and pickle work and every process of n_jobs
    loads the model itself.
    """

    def __init__(self, model="ViT-B/32", kind="image", device=None, dtype=None):
        self.model = model
        self.kind = kind
        self.device = device
        self.dtype = dtype

    def fit(self, X, y=None):
        """Nothing is learned: CLIP is as it is."""
        if self.kind not in ("image", "text"):
            raise ValueError(f'kind must be "image" or "text", not {self.kind!r}')
        self.embedder_ = npclip.Embedder(self.model, device=self.device, dtype=self.dtype)
        return self

    def transform(self, X):
        """Of each of X, in order."""
        check_is_fitted(self)
        embed = self.embedder_.embed_images if self.kind == "image" else self.embedder_.embed_texts
        return embed(list(X))

    def get_feature_names_out(self, input_features=None):
        """clip0, clip1 ..."""
        check_is_fitted(self)
        return np.array([f"clip{i}" for i in range(self.embedder_.dimension)], dtype=object)


def pipeline(model, memory=None):
    """memory: a folder that keeps embeddings, so that a search embeds each fold once."""
    steps = [("clip", ClipEmbedder(model)), ("classify", LogisticRegression(max_iter=1000))]
    return Pipeline(steps, memory=memory)


def main(photos, model="ViT-B/32"):
    """Print how well the classes are told apart, and the best regularisation."""
    paths = sorted(str(path) for path in Path(photos).glob("*/*"))
    labels = [Path(path).parent.name for path in paths]
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    scores = cross_val_score(pipeline(model), paths, labels, cv=folds, n_jobs=2)
    print(f"accuracy {scores.mean():.3f} +- {scores.std():.3f} in {len(scores)} folds")
    grid = {"classify__C": [0.1, 1.0, 10.0]}
    search = GridSearchCV(pipeline(model, memory=".clip-cache"), grid, cv=folds)
    search.fit(paths, labels)
    print(f"best C {search.best_params_['classify__C']}, accuracy {search.best_score_:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
