"""Publish a release on the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id

from lab.model.release import ReleaseError, load_release, read_release, release_files


def push(folder: Path, repo_id: str, private: bool, dry_run: bool) -> list[str]:
    """Upload a release with its card; without network where `dry_run`.

    Args:
        folder: Of the release, which is loaded first: what cannot be loaded is not published.
        repo_id: `name` or `owner/name`, made when there is none.
        private: Of a repository that is made.
        dry_run: Check all, upload nothing.

    Returns:
        What is or would be uploaded, as paths below the folder.

    Raises:
        ReleaseError: Not a sound release, or not a release alone; or not the name of a repository.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ReleaseError(f"'{repo_id}' is not the name of a repository; give owner/name") from None
    if "base" not in read_release(folder)[0]:  # what needs a base cannot be loaded without it
        load_release(folder)
    files = release_files(folder)
    if "README.md" not in files:
        raise ReleaseError(f"release '{folder}' has no card (README.md); write it again with core-seg release")
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if others := sorted(present - set(files)):
        raise ReleaseError(f"release '{folder}' holds '{others[0]}', which is no part of a release; move it elsewhere")
    if not dry_run:
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=files, commit_message="CORE-Seg release")
    return files
