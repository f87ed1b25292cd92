"""Does anything that was saved get lost, or a wrong result come out in silence? Kills, flipped bits and failing disks.

    python -m pipelines.measure.trust --workers 16 --minutes 8 -o trust.json

Every trial has a folder of its own and is made in a forked process that has imported everything and loaded the toy
model's encoders, so that a command takes a tenth of a second to a second of arithmetic and writing.
"""
