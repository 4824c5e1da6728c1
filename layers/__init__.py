"""The layers of a model: attention, feed-forward, experts, and the kernels that compute them."""
