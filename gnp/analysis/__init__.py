"""What finished and unfinished runs show: reads work directories, draws figures, makes tables."""
