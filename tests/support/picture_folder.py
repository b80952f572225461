"""A folder of pictures for the caption command, and the demo model's caption of each."""

SCENES = {
    "1.png": ("circle", "red", "blue"),
    "2.jpg": ("square", "yellow", "green"),
    "10.webp": ("triangle", "green", "white"),
    "sub/deep.png": ("circle", "pink", "black"),
}
CAPTIONS = {
    "1.txt": "a red circle on a blue background",
    "2.txt": "a yellow square on a green background",
    "10.txt": "a green triangle on a white background",
    "sub/deep.txt": "a pink circle on a black background",
}
ASK = ["--prompt", "Describe this image.", "--no-do-sample"]
