"""Swin transformers on ImageNet, with gradient regularization.

    python -m gnp.train --config=configs/imagenet_swin.py:model=swin_t,gr=zero --workdir=runs/swin

Arguments, as key=value with commas between them:
    model      swin_t, swin_s, swin_b
    gr         off, none, r, lambda, zero

From the Swin paper (Section 4.1): 300 epochs, AdamW with weight decay 0.05, batch 1024, learning
rate 1e-3, cosine, 20 epochs of warmup, stochastic depth 0.2, 0.3 and 0.5 for T, S and B, gradients
clipped at 5 (its code); random crops and flips, RandAugment of magnitude 9, erasing with
probability 0.25, mixup 0.8 or CutMix 1, label smoothing 0.1. From the GR paper: r = 0.1, ratio 1.
Ours: RandAugment's magnitude is always 9 (Swin's varies by 0.5), and mixup or CutMix is drawn for
each image.

The data are TensorFlow Datasets' imagenet2012, or --config.data.name=imagenet: the folders train/
and val/. They are streamed, unless they fit into memory. This recipe has been run on a few
generated images only.
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
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    config.data.augment = (
        "random_resized_crop,flip,rand_augment:2:9,random_erasing:0.25,"
        "mixup_or_cutmix:0.8:1,label_smoothing:0.1"
    )

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
