"""What several algorithms share: baselines, anchors, quantiles.

Each convention of ties, masks and leave-one-out means is written here, once.
Start at ops.py.
"""
