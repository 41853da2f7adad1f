"""Swin transformers on CIFAR-10 and CIFAR-100: the recipe of the GR paper, Table 3.

    python -m gnp.train --config=configs/cifar_swin.py:model=swin_t,gr=zero --workdir=runs/swin

Arguments, as key=value with commas between them:
    data       cifar10, cifar100
    model      swin_t, swin_s, swin_b
    patch      2, 4 (16 × 16 or 8 × 8 tokens in the first stage; windows are of 4 × 4)
    gr         off, none, r, lambda, zero
    optimizer  adam, rmsprop
    scale      paper, small (widths from 32 in two stages of 2 blocks, patches of 4 × 4, batch 128,
               16 epochs; for CPUs, sizes are ours)

From the paper: 300 epochs, batch 256, cosine, weight decay 0.03, gradient clipping, padding 4,
random crop and flip; one each of the values that it searches: learning rate 1e-3 (of 5e-3, 1e-3,
5e-4), warmup 40 epochs (of 20, 40, 80), r 0.1 (of 0.05, 0.1), ratio 1 (of 0.8, 1). Ours, since the
paper leaves it open: the decay is decoupled, the norm that gradients are clipped to is 1, and there
is no dropout and no stochastic depth.

One epoch of scale=small with gr=off (--config.epochs=1 --config.lr.warmup=20%), one seed, two CPU
cores: test error 68.5 % in 51 s. Neither scale has been run to its end.
"""

from ml_collections import ConfigDict

from gnp import config as gnp_config


def get_config(argument: str = "") -> ConfigDict:
    arguments = gnp_config.arguments(
        argument,
        data="cifar10",
        model="swin_t",
        patch="",
        gr="zero",
        optimizer="adam",
        scale="paper",
    )
    gnp_config.choose("data", arguments.data, ("cifar10", "cifar100"))
    gnp_config.choose("model", arguments.model, ("swin_t", "swin_s", "swin_b"))
    gnp_config.choose("patch", arguments.patch or "2", ("2", "4"))
    gnp_config.choose("scale", arguments.scale, ("paper", "small"))
    config = gnp_config.default()
    config.epochs = 300.0

    config.model.name = arguments.model
    config.model.patch_size = int(arguments.patch or "2")
    config.model.window_size = 4
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
        config.model.patch_size = int(arguments.patch or "4")
        config.model.width = 32
        config.model.depths = (2, 2)
        config.model.num_heads = 2
        config.checkpoint.every = "1ep"
    return config
