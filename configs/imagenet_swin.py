"""Swin transformers on ImageNet, with gradient regularization.

    python -m gnp.train --config=configs/imagenet_swin.py:model=swin_t,gr=zero --workdir=runs/swin

Arguments, as key=value with commas between them:
    model      swin_t, swin_s, swin_b
    gr         off, none, r, lambda, zero

From the Swin paper (Section 4.1): 300 epochs, AdamW with weight decay 0.05, batch 1024, learning
rate 1e-3, cosine, 20 epochs of warmup, stochastic depth 0.2, 0.3 and 0.5 for T, S and B, gradients
clipped at 5 (its code). From the GR paper: r = 0.1, ratio 1. Ours: of Swin's augmentations there
are random crops and flips, without RandAugment, mixup, CutMix and erasing, so its published errors
will not be reached.

The images are kept in memory at 256 × 256 pixels: 262 GB for all of ImageNet, which few machines
have; what fits (a part of it, prepared by TFDS under its name) trains as it is. This recipe has
been run on a few generated images only.
"""

from ml_collections import ConfigDict

from gnp import config as gnp_config


def get_config(argument: str = "") -> ConfigDict:
    arguments = gnp_config.arguments(argument, model="swin_t", gr="zero")
    stochastic_depth = {"swin_t": 0.2, "swin_s": 0.3, "swin_b": 0.5}
    gnp_config.choose("model", arguments.model, list(stochastic_depth))
    config = gnp_config.default()
    config.epochs = 300.0

    config.model.name = arguments.model
    config.model.stochastic_depth = stochastic_depth[arguments.model]
    config.dtype = "bfloat16"
    config.data.name = "imagenet2012"
    config.data.image_size = 224
    config.data.batch_size = 1024
    config.data.augment = "random_resized_crop,flip"

    config.optimizer.name = "adam"
    config.lr.base = 1e-3
    config.lr.schedule = "cosine"
    config.lr.warmup = "20ep"
    config.weight_decay.kind = "decoupled"
    config.weight_decay.value = 0.05
    config.clip_norm = 5.0

    config.gr.policy = arguments.gr
    config.gr.radius = 0.1
    config.gr.ratio = 1.0
    config.checkpoint.every = "1ep"
    return config
