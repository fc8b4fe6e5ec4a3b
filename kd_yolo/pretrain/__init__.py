"""``kd-yolo pretrain``: a small network learns stage by stage, without labels, what a pretrained one computes."""
