"""evaluate() against the loop of openai/CLIP's notebook on prompt engineering, in torch."""

import numpy as np
import PIL.Image
import torch
from random_checkpoint import random_tensors
from safetensors.numpy import save_file

import npclip
from npclip.config import ARCHITECTURES, Metadata
from npclip.evaluation.zero_shot import evaluate

LABELS = ["tabby cat", "rocket", "night sky", "wine glass"]
TEMPLATES = ["a photo of a {}.", "a blurry painting of the {}."]


def test_predictions_and_probabilities_are_openai_clips(openai_clip, pictures, tmp_path):
    for name in ("chelsea.png", "rocket.jpg"):
        for i, box in enumerate([(0, 0, 300, 300), (100, 50, 400, 280), (200, 0, 260, 200)]):
            folder = tmp_path / "photos" / LABELS[i]
            folder.mkdir(parents=True, exist_ok=True)
            PIL.Image.open(pictures / name).crop(box).save(folder / name)
    (tmp_path / "photos" / LABELS[3]).mkdir()
    tensors = random_tensors(ARCHITECTURES["ViT-B/32"])
    path = tmp_path / "random.safetensors"
    save_file(tensors, path, Metadata(activation="quick_gelu").to_strings())
    model = npclip.load(path, device="cpu")
    found = evaluate(model, tmp_path / "photos", templates=TEMPLATES, cache=False)
    labels, files = sorted(LABELS), sorted((tmp_path / "photos").rglob("*.*"))
    scores = npclip.ZeroShot(model, labels, TEMPLATES, cache=False).scores(files)
    del model

    state = {key: torch.from_numpy(value) for key, value in tensors.items()}
    openai = openai_clip.model.build_model(state).float().eval()
    transform = openai_clip.clip._transform(openai.visual.input_resolution)
    with torch.no_grad():
        zeroshot_weights = []
        for label in labels:
            texts = openai_clip.tokenize([template.format(label) for template in TEMPLATES])
            class_embeddings = openai.encode_text(texts)
            class_embeddings /= class_embeddings.norm(dim=-1, keepdim=True)
            class_embedding = class_embeddings.mean(dim=0)
            zeroshot_weights.append(class_embedding / class_embedding.norm())
        images = torch.stack([transform(PIL.Image.open(file)) for file in files])
        image_features = openai.encode_image(images)
        image_features /= image_features.norm(dim=-1, keepdim=True)
        logits = 100.0 * image_features @ torch.stack(zeroshot_weights, dim=1)
        probabilities = logits.softmax(dim=-1).numpy()
    assert found.labels == labels
    assert found.truth.tolist() == [labels.index(file.parent.name) for file in files]
    np.testing.assert_array_equal(found.predicted, logits.argmax(dim=-1).numpy())
    np.testing.assert_allclose(scores, probabilities, atol=1e-4)
    assert np.ptp(np.sort(logits.numpy())[:, -2:], axis=1).min() > 1e-3, "too close to tell"
