// A partial ranking: tiers of tied responses, best first, and unplaced responses.

export class Ranking {
  constructor(count, tiers = []) {
    this.count = count;
    const seen = new Set();
    const fresh = (place) => Number.isInteger(place) && place >= 0 && place < count && !seen.has(place) && seen.add(place);
    this.tiers = tiers.map((tier) => tier.filter(fresh)).filter((tier) => tier.length);
  }

  get unplaced() {
    const placed = new Set(this.tiers.flat());
    return Array.from({ length: this.count }, (_, place) => place).filter((place) => !placed.has(place));
  }

  get complete() {
    return this.unplaced.length === 0;
  }

  get ranks() {
    return Array.from({ length: this.count }, (_, place) => this.tierOf(place) + 1);
  }

  tierOf(place) {
    return this.tiers.findIndex((tier) => tier.includes(place));
  }

  remove(place) {
    this.tiers = this.tiers.map((tier) => tier.filter((other) => other !== place)).filter((tier) => tier.length);
  }

  // Ranks a response last, or tied with the last one.
  append(place, tied = false) {
    this.remove(place);
    if (tied && this.tiers.length) this.tiers.at(-1).push(place);
    else this.tiers.push([place]);
  }

  // Moves a response into a tier, numbered before the move.
  join(place, tier) {
    if (this.tiers[tier].includes(place)) return;
    const friend = this.tiers[tier][0];
    this.remove(place);
    const joined = this.tiers[this.tierOf(friend)];
    joined.push(place);
    joined.sort((a, b) => a - b);
  }

  // Moves a response to a tier of its own before tier `before`, numbered before the move.
  insert(place, before) {
    const next = this.tiers.slice(before).find((tier) => tier.some((other) => other !== place));
    this.remove(place);
    const at = next ? this.tiers.findIndex((tier) => tier.some((other) => next.includes(other))) : this.tiers.length;
    this.tiers.splice(at, 0, [place]);
  }

  // Moves a response one step up (-1) or down (+1): out of a tie, or into a tie with the neighbour.
  move(place, step) {
    const tier = this.tierOf(place);
    if (tier < 0) return this.append(place);
    if (this.tiers[tier].length > 1) return this.insert(place, step < 0 ? tier : tier + 1);
    const neighbour = this.tiers[tier + step];
    if (neighbour) this.join(place, tier + step);
  }

  static byRatings(ratings) {
    const known = [...new Set(ratings.filter((rating) => rating !== null))].sort((a, b) => b - a);
    return new Ranking(ratings.length, known.map((rating) => ratings.flatMap((other, place) => (other === rating ? [place] : []))));
  }

  words(place) {
    const tier = this.tierOf(place);
    if (tier < 0) return "not ranked";
    const tied = this.tiers[tier].length > 1 ? ", tied" : "";
    return `rank ${tier + 1} of ${this.tiers.length}${tied}`;
  }
}
