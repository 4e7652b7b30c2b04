"""The page on a Hugging Face Space, which runs this file and looks for a server at port 7860."""
import os

from fer_nbdev.page import mount_page
from fer_nbdev.serve import Limits, create_app, run_app

app = mount_page(create_app(limits=Limits(queue=32, streams=4, videos=2, video_seconds=120)))

if __name__ == "__main__":
    run_app(app, host=os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"), port=int(os.environ.get("GRADIO_SERVER_PORT", 7860)))
