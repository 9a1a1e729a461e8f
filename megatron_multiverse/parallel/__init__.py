"""What launches ranks and describes how a model is spread over them."""
