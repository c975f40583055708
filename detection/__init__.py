"""Object detection with timm backbones: do mixed representations transfer?"""
