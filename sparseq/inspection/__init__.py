"""Looking into a trained model: how its routers spread tokens over the experts."""
