"""Signatures of bundles by OpenSSF Model Signing: made at registration, checked whenever a bundle is fetched.

Keys are plain elliptic ones in PEM files (P-256, P-384, P-521); nothing is asked over the network.
"""

import tempfile
from pathlib import Path

from mlflow.exceptions import MlflowException

from vismem.config import RegistryConfig
from vismem.errors import UserError, one_line
from vismem.registry.tracking import Store
from vismem.registry.versions import Version

SIGNATURE = "bundle.sig"  # beside the bundle in the logged model
INSTALL = "signatures need the package model-signing (no module {}): pip install 'vismem[signing]'"


class SignatureError(UserError):
    """A bundle is not signed, or not by the key that is trusted."""


def sign_bundle(config: RegistryConfig, bundle: Path, out: Path) -> Path | None:
    """Sign by `registry.signing_key` into `out`; return the file, or None without a key. UserError for an unfit one."""
    if config.signing_key is None:
        return None
    try:
        from model_signing import signing

        signing.Config().use_elliptic_key_signer(private_key=config.signing_key).sign(bundle, out / SIGNATURE)
    except ModuleNotFoundError as error:
        raise UserError(INSTALL.format(error.name)) from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"registry.signing_key {config.signing_key} signs nothing ({error}): name the PEM file of an elliptic "
            "private key without a password, as `openssl ecparam -name prime256v1 -genkey -noout` makes one"
        ) from None
    return out / SIGNATURE


def check_signature(store: Store, version: Version, bundle: Path) -> None:
    """SignatureError unless `bundle`, as it was fetched, is signed by `registry.public_key`, where that is set."""
    if (key := store.config.public_key) is None:
        return
    called = f"{store.model} version {version.version}"
    if not key.is_file():
        raise UserError(f"registry.public_key {key} is not there: name the PEM file of an elliptic public key")
    location = str(store.client.get_logged_model(version.model_id).artifact_location)
    try:
        from model_signing import verifying

        with tempfile.TemporaryDirectory() as folder:
            file = store.files(location).download_artifacts(SIGNATURE, folder)
            verifying.Config().use_elliptic_key_verifier(public_key=key).verify(bundle, Path(file))
    except ModuleNotFoundError as error:
        raise UserError(INSTALL.format(error.name)) from None
    except (MlflowException, OSError) as error:
        raise SignatureError(f"{called} has no signature, and registry.public_key asks for one") from error
    except Exception as error:  # whatever a file that is no signature leads to
        raise SignatureError(f"{called} is not signed by the key of registry.public_key ({one_line(error)})") from error
