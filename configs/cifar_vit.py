"""Vision transformers on CIFAR-10 and CIFAR-100: the recipe of the GR paper, Table 3.

    python -m gnp.train --config=configs/cifar_vit.py:model=vit_ti,gr=zero --workdir=runs/cifar

Arguments, as key=value with commas between them:
    data       cifar10, cifar100
    model      vit_ti, vit_s, vit_b
    gr         off, none, r, lambda, zero
    optimizer  adam, rmsprop
    scale      paper, small (4 blocks of width 64 on patches of 8 × 8, batch 128, 16 epochs: minutes
               on two CPU cores, the five curves in the README; sizes are ours)

From the paper: 300 epochs, batch 256, cosine, weight decay 0.03, gradient clipping, padding 4,
random crop and flip; one each of the values that it searches: learning rate 1e-3 (of 5e-3, 1e-3,
5e-4), warmup 40 epochs (of 20, 40, 80), r 0.1 (of 0.05, 0.1), ratio 1 (of 0.8, 1). Ours, since the
paper leaves it open: the decay is decoupled, and the norm that gradients are clipped to is 1.

scale=small on two CPU cores, one seed, images decoded from JPEG copies: test error 38.8 % with
gr=off, 42.1 % with none, 41.5 % with r, 42.0 % with lambda, 40.2 % with zero; 5 minutes without GR,
10 to 17 with it on a machine that did other work too (run on commit 607e0bd; rounding and the order
of the examples have changed since). scale=paper has not been run.
"""

from ml_collections import ConfigDict

from gnp import config as gnp_config


def get_config(argument: str = "") -> ConfigDict:
    arguments = gnp_config.arguments(
        argument, data="cifar10", model="vit_ti", gr="zero", optimizer="adam", scale="paper"
    )
    gnp_config.choose("data", arguments.data, ("cifar10", "cifar100"))
    gnp_config.choose("model", arguments.model, ("vit_ti", "vit_s", "vit_b"))
    gnp_config.choose("scale", arguments.scale, ("paper", "small"))
    config = gnp_config.default()
    config.epochs = 300.0

    config.model.name = arguments.model
    config.data.name = arguments.data
    config.data.batch_size = 256
    config.data.augment = "basic"

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
        config.model.patch_size = 8
        config.model.width = 64
        config.model.depth = 4
        config.model.num_heads = 4
        config.checkpoint.every = "1ep"
    return config
