"""Vision transformers on Tiny-ImageNet: the recipe of the GR paper, Table 3, at 64 × 64 pixels.

    python -m gnp.prepare tiny_imagenet --data_dir=data
    python -m gnp.train --config=configs/tiny_imagenet_vit.py:model=vit_ti,gr=zero \
        --config.data.data_dir=data --workdir=runs/tiny

Arguments, as key=value with commas between them:
    model      vit_ti, vit_s, vit_b
    gr         off, none, r, lambda, zero
    optimizer  adam, rmsprop
    augment    basic, heavy
    scale      paper, small (4 blocks of width 64, batch 128, 16 epochs; for CPUs, sizes are ours)

From the paper: 300 epochs, batch 256, cosine, weight decay 0.03, gradient clipping, random crop and
flip; one each of the values that it searches: learning rate 1e-3 (of 5e-3, 1e-3, 5e-4), warmup 40
epochs (of 20, 40, 80), r 0.1 (of 0.05, 0.1), ratio 1 (of 0.8, 1). Ours, since the paper leaves it
open: patches of 8 × 8, 8 pixels of padding (4 at 32 × 32), a decoupled decay, and clipping at 1.
augment=heavy adds RandAugment, random erasing, mixup, CutMix and label smoothing.

scale=small with gr=zero on a part of the data, 20 of the 200 classes and 2,000 images: test error
73.1 % (top-1, one seed) in 107 s on two CPU cores, where 2,000 images are far too few for more.
scale=paper has not been run.
"""

from ml_collections import ConfigDict

from gnp import config as gnp_config


def get_config(argument: str = "") -> ConfigDict:
    arguments = gnp_config.arguments(
        argument, model="vit_ti", gr="zero", optimizer="adam", augment="basic", scale="paper"
    )
    gnp_config.choose("model", arguments.model, ("vit_ti", "vit_s", "vit_b"))
    gnp_config.choose("augment", arguments.augment, ("basic", "heavy"))
    gnp_config.choose("scale", arguments.scale, ("paper", "small"))
    config = gnp_config.default()
    config.epochs = 300.0

    config.model.name = arguments.model
    config.model.patch_size = 8
    config.data.name = "tiny_imagenet"
    config.data.batch_size = 256
    config.data.augment = "pad_crop:8,flip"
    if arguments.augment == "heavy":
        config.data.augment += (
            ",rand_augment:2:9,random_erasing:0.25,mixup_or_cutmix:0.8:1,label_smoothing:0.1"
        )

    config.optimizer.name = arguments.optimizer
    config.lr.base = 1e-3
    config.lr.schedule = "cosine"
    config.lr.warmup = "40ep"
    config.weight_decay.kind = "decoupled"
    config.weight_decay.value = 0.03
    config.clip_norm = 1.0

    config.gr.policy = arguments.gr
    config.gr.radius = 0.1
    config.gr.ratio = 1.0

    if arguments.scale == "small":
        config.epochs = 16.0
        config.lr.warmup = "4ep"
        config.data.batch_size = 128
        config.model.width = 64
        config.model.depth = 4
        config.model.num_heads = 4
        config.checkpoint.every = "1ep"
    return config
