"""What famjax costs: training, prefill and decoding on this machine, beside the floor by formula."""
