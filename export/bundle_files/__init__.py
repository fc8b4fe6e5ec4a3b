"""What an edge bundle holds beside the model; ``detect.py`` stands alone and imports nothing of kd_yolo."""
