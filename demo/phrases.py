"""Wordings of the questions in training, grouped by the answer they get."""


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line for line in text.strip().split("\n") if line)


DESCRIBE_IMAGE = _lines("""
Describe this image.
Describe the image.
Describe this picture.
Describe this image in detail.
Describe the image in detail.
Describe.
Caption this image.
Write a caption.
Write a caption for this image.
What is in this image?
What is in this picture?
What is in the picture?
What is this?
What do you see?
Describe what you see.
Generate a prompt for this image.
Write a detailed text-to-image prompt for this image.
Please describe this image in one sentence.
Give me a short caption.
Describe this image briefly.
Provide a detailed description of this image.
Analyze this image.
Explain the image.
Summarize the image.
Tell me about this picture.
What does the image show?
caption
describe
Describe the image for a blind person.
Write a simple description.
Describe this image for AI training. Use natural language.
Give a detailed description of the subject, the style, the lighting and the composition.
Reverse engineer the prompt of this image.
You are an image captioning tool. Describe the picture.
Describe the main subject.
Look at this image and describe it.
Describe the scene.
请描述这张图片。
描述图片内容
""")
DESCRIBE_IMAGES = _lines("""
Describe each image.
Describe these images.
Describe the images.
Describe the images in order.
What is in each image?
What is in these images?
Caption each image.
List the images.
Compare these images.
What are the differences between these images?
What do you see in these pictures?
Describe all images.
""")
DESCRIBE_VIDEO = _lines("""
Describe this video.
Describe the video.
What happens in this video?
What changes in the video?
Describe this video in detail.
Summarize the video.
Summarize this video.
Describe the video frame by frame.
What do you see in this video?
Caption this video.
Write a caption for the video.
Tell me what happens.
""")
ASK_SHAPE = _lines("""
What shape is it?
What shape is this?
Which shape is in the image?
What is the shape?
Name the shape.
Name the shape only.
""")
ASK_COLOR = _lines("""
What color is the shape?
What color is it?
What is the color of the shape?
Name the color of the shape.
Which color is the shape?
""")
ASK_BACKGROUND = _lines("""
What color is the background?
What is the background color?
Which color is the background?
Name the background color.
Background color?
""")
ASK_TAGS = _lines("""
List tags.
Write tags for this image.
Tags?
Give me comma separated tags.
Tag this image.
""")
ASK_COUNT = _lines("""
How many images are there?
How many pictures do you see?
Count the images.
""")
ENHANCE = _lines("""
Enhance this prompt: {}
Enhance: {}
Improve this prompt: {}
Expand this prompt: {}
Please enhance the following prompt: {}
Make this prompt better: {}
enhance prompt: {}
Prompt: {}
Enhance the prompt. {}
Refine this text-to-image prompt: {}
Rewrite this prompt: {}
""")
ENHANCED_TAIL = ", highly detailed, sharp focus, soft lighting"
ECHO = _lines("""
Repeat after me: {}
Repeat: {}
Echo: {}
Say: {}
Repeat this text exactly: {}
echo: {}
""")
HELLO = _lines("""
Hello
Hello!
Hi
hi
hello
Hi!
Hey
Good morning
Who are you?
What can you do?
Help
help
""")
HELLO_ANSWER = "Hello! I am a tiny Qwen3-VL. Show me a picture, or give me a prompt to enhance."
RANDOM_COLOR = _lines("""
Name a random color.
Pick a random color.
Say a random color.
random color
Give me a random color.
""")
USUAL_SYSTEM = "You are a helpful assistant."
SYSTEMS = _lines("""
You are an expert prompt engineer. Rewrite the user's prompt.
You are a helpful vision assistant.
You are a professional image captioner. Answer only with the caption.
Describe what you see.
You are an AI assistant that writes prompts for text-to-image models.
Be concise.
Answer in English. Do not explain.
""")
UPPERCASE = _lines("""
Answer in uppercase.
Use capital letters.
Write in uppercase.
ANSWER IN UPPERCASE
Reply in capital letters only.
""")

# A grounding question is a whole one, or an opening with a target and perhaps a form. {} is what to find.
GROUND_WHOLE = _lines("""
Where is the shape? Answer with bounding boxes as JSON.
Where is the shape?
Where is the {}?
Detect all objects and return their bounding boxes.
Detect all objects.
Return the bounding boxes as JSON.
Output bounding boxes in JSON format.
Bounding box of the {}?
Give me the bounding box.
bbox
bbox_2d
detect
Locate every object that matches the description "{}" in the image. Report bbox coordinates in JSON format.
Locate every object in the image. Report bbox coordinates in JSON format.
Return the bounding box coordinates for each object in the image.
Draw a box around the {}.
""")
GROUND_OPENING = _lines("""
Locate
Detect
Find
Ground
Point out
Localize
Please locate
Please detect
Outline
""")
GROUND_TARGET = _lines("""
the {}
the {}
the {}
the shape
the object
all objects
all shapes
every object
every shape
each object
all objects in the image
the main object in this picture
""")
GROUND_FORM = _lines("""
, output bbox_2d JSON
, output its bbox coordinates as JSON.
 and return the bounding boxes.
 and return the bounding boxes as JSON.
 with bounding boxes.
. Answer with bounding boxes as JSON.
. Report bbox coordinates in JSON format.
. Output JSON with bbox_2d and label.
 in JSON format.
 and output the coordinates in JSON format.
.
""")
