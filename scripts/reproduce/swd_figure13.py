"""Figure 13 of the SWD paper: an LSTM language model on the Penn TreeBank.

    python scripts/reproduce/swd_figure13.py --out=runs/swd_figure13 --data_dir=DIR

9 runs of 200 epochs (3 seeds): 9·10¹⁶ FLOPs, 15 minutes on a GPU at 10¹⁴ FLOP/s. --scale=small:
200 features, 2 epochs.

Neither scale has been run to its end.
"""

from reproduction import Sweep, main

DECAYS = {"decay": "l2,decoupled,scheduled"}
SCALES = {
    "paper": [Sweep("runs", "ptb_lstm.py", DECAYS)],
    "small": [Sweep("runs", "ptb_lstm.py:scale=small", DECAYS, {"epochs": 2})],
}

if __name__ == "__main__":
    main(__doc__, SCALES, seeds=3)
