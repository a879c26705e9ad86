from __future__ import annotations

import torch
import torch.nn.functional as F

from expertmesh.train.vectors import token_vectors

VOCAB, WIDTH, STD = 40, 8, 0.1


def texts_of_two_subjects() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens 1 to 9 stand together, 11 to 19 stand together, 20 to 24 stand with both; 30 to 39 never occur."""
    random = torch.Generator().manual_seed(0)
    texts = []
    for text in range(400):
        subject = torch.randint(1, 10, (8,), generator=random) + 10 * (text % 2)
        texts.append(
            torch.cat([subject, torch.randint(20, 25, (3,), generator=random)])[torch.randperm(11, generator=random)]
        )
    return torch.cat(texts), torch.full((400,), 11)


def test_tokens_that_stand_together_get_like_vectors() -> None:
    torch.manual_seed(0)
    vectors_VD = F.normalize(token_vectors(*texts_of_two_subjects(), VOCAB, WIDTH, STD), dim=1)
    alike = vectors_VD[1:10] @ vectors_VD[1:10].T
    apart = vectors_VD[1:10] @ vectors_VD[11:20].T
    assert alike.mean() > apart.mean() + 0.5


def test_vectors_have_the_deviation_that_is_asked_for_and_unseen_tokens_none() -> None:
    torch.manual_seed(0)
    vectors_VD = token_vectors(*texts_of_two_subjects(), VOCAB, WIDTH, STD)
    assert vectors_VD.shape == (VOCAB, WIDTH)
    assert vectors_VD[1:10].std() > 0
    seen = [*range(1, 10), *range(11, 20), *range(20, 25)]
    torch.testing.assert_close(vectors_VD[seen].std(), torch.tensor(STD), atol=1e-2, rtol=0)
    assert vectors_VD[30:].abs().max() < 1e-4


def test_neighbours_in_another_text_do_not_count() -> None:
    torch.manual_seed(0)
    ids_T = torch.tensor([1, 2, 3, 4] * 50)
    apart_VD = F.normalize(token_vectors(ids_T, torch.full((100,), 2), 6, 4, STD), dim=1)
    assert apart_VD[1] @ apart_VD[3] < 0.1  # 1 and 2 share texts, 3 and 4 do, 2 and 3 only touch
