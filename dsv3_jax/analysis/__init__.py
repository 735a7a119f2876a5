"""What a run left behind, read back: reports from the files of a workdir."""
