"""``k5train doctor``: would training work on this machine? Files by kind: facts are read, then judged as values."""
