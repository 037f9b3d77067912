"""What must not be learned by heart: keys, passwords and tokens, and, less gravely, personal data.

The shapes of secrets are those of detect-secrets, of its detectors that match a fixed form; those that guess from
entropy or from words nearby would report much of ordinary code. A model can be made to repeat what it was trained on.
"""

from __future__ import annotations

import re
from functools import cache

DETECTORS = (
    "aws.AWSKeyDetector", "azure_storage_key.AzureStorageKeyDetector", "basic_auth.BasicAuthDetector",
    "discord.DiscordBotTokenDetector", "github_token.GitHubTokenDetector", "gitlab_token.GitLabTokenDetector",
    "jwt.JwtTokenDetector", "mailchimp.MailchimpDetector", "npm.NpmDetector", "openai.OpenAIDetector",
    "private_key.PrivateKeyDetector", "pypi_token.PypiTokenDetector", "sendgrid.SendGridDetector",
    "slack.SlackDetector", "square_oauth.SquareOAuthDetector", "stripe.StripeDetector",
    "telegram_token.TelegramBotTokenDetector", "twilio.TwilioKeyDetector",
)  # fmt: skip
MORE = {
    "Hugging Face token": r"hf_[A-Za-z]{34}(?!\w)",
    "Google API key": r"AIza[0-9A-Za-z_-]{35}(?![0-9A-Za-z_-])",
    "Anthropic API key": r"sk-ant-[A-Za-z0-9_-]{24,}",
    "OpenAI API key": r"sk-(?:proj|svcacct|admin)-[A-Za-z0-9_-]{24,}",
    "secret key": r"(?<![\w-])sk-(?=[A-Za-z]*\d)[A-Za-z0-9]{32,}(?!\w)",
    "GitHub token": r"github_pat_[A-Za-z0-9_]{60,}",
}
# Addresses and numbers that belong to nobody are left out: example domains, and 555 as films use it.
EMAIL = re.compile(
    r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@(?!(?:[\w-]+\.)*(?:example|test|domain|yourdomain|company|email|xyz|abc|acme)\.)"
    r"(?:[A-Za-z0-9-]{1,63}\.){1,4}[A-Za-z]{2,12}(?![\w@])"
)
PHONE = re.compile(
    r"(?<![\w.,/+-])(?:\+\d{1,3}[ .-]?)?(?:\((?!555|123|000)\d{3}\) ?|(?!555|123|000)\d{3}[ .-])(?!555)\d{3}[ .-]\d{4}"
    r"(?![\w-]|[.,]\d)"
    r"|(?<![\w+])\+\d{1,3}(?:[ .-]?\d{2,4}){3,4}(?![\w-])"
)


@cache
def shapes() -> tuple[tuple[str, re.Pattern[str]], ...]:
    """Name and pattern of every secret that is looked for."""
    from importlib import import_module

    found = []
    for path in DETECTORS:
        module, _, name = path.partition(".")
        detector = getattr(import_module(f"detect_secrets.plugins.{module}"), name)
        found += [(str(detector.secret_type), pattern) for pattern in detector.denylist]
    return (*found, *((name, re.compile(pattern)) for name, pattern in MORE.items()))


def masked(text: str) -> str:
    """Enough of a secret to find it again, and no more: its first characters, at most four."""
    return text[: min(4, len(text) // 4)] + "…"
