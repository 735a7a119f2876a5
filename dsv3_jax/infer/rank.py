"""One device's share of an engine: its pages, and the requests that live in them.

Pages are taken as a request grows. Where none is left the youngest request here gives its pages
back; the oldest always goes on, so all come to an end.
"""

import collections
import dataclasses

from dsv3_jax.infer.batches import Settings
from dsv3_jax.infer.pages import Pages
from dsv3_jax.infer.request import Job


@dataclasses.dataclass(eq=False)
class Offer:
  """A job whose prompt was run, for another engine to go on with.

  Attributes:
    job: it belongs to the other engine.
    rank: where it was.
    pages: of that rank, which hold all but its last token until `Rank.free`.
  """

  job: Job
  rank: "Rank"
  pages: list[int]


class Rank:
  """Requests of one device.

  Args:
    number: of the device.
    settings: sizes.

  Attributes:
    pages: its pages of the cache.
    prompts: jobs whose prompts are being run, in turns.
    writing: those that decode, oldest first.
    offers: to another engine, which has not yet taken them.
  """

  def __init__(self, number: int, settings: Settings):
    self.number, self._settings = number, settings
    self.pages = Pages(settings.pages, settings.page_size, settings.share)
    self.prompts: collections.deque[Job] = collections.deque()
    self.writing: list[Job] = []
    self.offers: set[Offer] = set()

  @property
  def live(self) -> list[Job]:
    """All that have pages, oldest first."""
    return sorted([*self.prompts, *self.writing], key=lambda job: job.submitted)

  def cost(self, job: Job) -> tuple[int, int, int]:
    """What it would cost to take a job here, to compare ranks by.

    Chunks of prompts that are run until it has its first token, and one for each neighbour that
    writes: a common beginning saves chunks, but does not draw all requests to one rank.
    """
    s = self._settings
    found = self.pages.known(self._shareable(job))
    chunks = sum(-(-(j.length - j.written) // s.chunk) for j in self.prompts)
    chunks += -(-(job.length - found * s.page_size) // s.chunk)
    return chunks + len(self.writing), -found, -self.pages.free

  def admit(self, job: Job) -> bool:
    """Gives a job pages for all it has, and takes it among the prompts, if there is room.

    Its `written` says how many of its tokens were found in the cache.
    """
    s = self._settings
    if len(self.prompts) + len(self.writing) >= s.running:
      return False
    found = self.pages.find(self._shareable(job))
    # One page more for each that writes: what is admitted should not be thrown out at once.
    need = job.length // s.page_size + 1 - len(found)
    taken = self.pages.take(need) if self.pages.free >= need + len(self.writing) else None
    if taken is None:
      self.pages.release(found)
      if not (self.prompts or self.writing or self.offers):
        raise RuntimeError(f"{self.pages.free} of {self.pages.count} pages are free with nothing "
                           "under way")
      return False
    job.rank, job.pages, job.published = self.number, found + taken, len(found)
    job.written = len(found) * s.page_size
    self.prompts.append(job)
    return True

  def write(self, job: Job) -> None:
    """Moves a job whose prompt was run to those that write."""
    self.prompts.remove(job)
    self.writing.append(job)
    self.writing.sort(key=lambda j: j.submitted)

  def grow(self, run: int) -> list[Job]:
    """Gives each that writes, oldest first, pages for the next `run` tokens.

    Returns:
      Those that had to leave for it, youngest first.
    """
    left = []
    for job in list(self.writing):
      if job not in self.writing:
        continue  # gave its pages back
      need = -(-(job.written + min(run, job.left)) // self.pages.size) - len(job.pages)
      while need > 0:
        taken = self.pages.take(need)
        if taken is not None:
          job.pages += taken
          break
        youngest = self.live[-1]
        self.leave(youngest)
        left.append(youngest)
        if youngest is job:
          break
    return left

  def publish(self, job: Job) -> None:
    """Lets others find the pages that were filled."""
    full = job.written // self.pages.size
    if full > len(job.names):
      self._name(job)
    for i in range(job.published, full):
      self.pages.publish(job.pages[i], job.names[i])
    job.published = max(job.published, full)

  def leave(self, job: Job) -> None:
    """Takes a job out of whatever it is in, and its pages from it."""
    for place in (self.prompts, self.writing):
      if job in place:
        place.remove(job)
    self.pages.release(job.pages)
    job.pages, job.written, job.published = [], 0, 0

  def offer(self, job: Job) -> Offer:
    """Gives a job that writes to another engine, without its pages."""
    filled = -(-job.written // self.pages.size)
    made = Offer(job, self, job.pages[:filled])
    self.pages.release(job.pages[filled:])
    self.offers.add(made)
    job.pages, job.written, job.published = [], 0, 0
    self.writing.remove(job)
    return made

  def free(self, offer: Offer) -> None:
    """Frees the pages of an offer, once."""
    if offer in self.offers:
      self.offers.remove(offer)
      self.pages.release(offer.pages)

  def _shareable(self, job: Job) -> list[bytes]:
    """Names of the pages that it may share: its last token must be run for what comes after it."""
    self._name(job)
    return job.names[:(job.length - 1) // self.pages.size]

  def _name(self, job: Job) -> None:
    """Makes the names of its full pages, unless it has them."""
    if job.named < job.length:
      job.names, job.named = self.pages.names(job.whole), job.length
