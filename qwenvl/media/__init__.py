"""Files and tensors in, pictures, frames of films and boxes out. Begin with media.py."""
