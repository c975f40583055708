"""Upload of exported folders to the Hugging Face hub."""
from pathlib import Path

from huggingface_hub import HfApi

from .folder import CARD, CONFIG, WEIGHTS, verify


def push(
        folder: str | Path, repo_id: str, *, private: bool = False, revision: str | None = None,
        create_pr: bool = False, token: str | None = None, message: str | None = None) -> str:
    """Check an exported folder and upload it, for `timm.create_model('hf-hub:OWNER/NAME', pretrained=True)`.

    The model card of the folder replaces the repository's.

    Args:
        folder: A folder of :func:`export`.
        repo_id: 'owner/name'; the repository is created if it does not exist.
        private: Make a new repository private.
        revision: Branch to commit to; None for the main one.
        create_pr: Open a pull request instead of committing.
        token: Access token; None takes the one `hf auth login` stored.
        message: Commit message.

    Returns:
        Address of the commit.

    Raises:
        ValueError: The folder's weights do not fit its network.
        huggingface_hub.errors.HfHubHTTPError: The hub refuses.

    Example:
        >>> push('runs/resnet50/export', 'me/resnet50.densemultimix_in1k')  # doctest: +SKIP
        'https://huggingface.co/me/resnet50.densemultimix_in1k/commit/...'
    """
    config = verify(folder)
    api = HfApi(token=token, library_name='timm')
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=str(folder), allow_patterns=[WEIGHTS, CONFIG, CARD], revision=revision,
        create_pr=create_pr,
        commit_message=message or f'Add {config["pretrained_cfg"].get("tag") or "weights"} of {config["architecture"]}')
    return commit.commit_url
