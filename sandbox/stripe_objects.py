"""Snapshot events as Stripe sends them: our own small model of its objects (API reference, docs.stripe.com/api).

Only shapes are taken over; ids, people and amounts are invented. Amounts are integers in the currency's smallest unit.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

OLD_API = "2020-08-27"
"""Versions before 2022-11-15 carry the charges inside the payment intent."""
NEW_API = "2026-08-26.dahlia"


@dataclass(frozen=True, slots=True, kw_only=True)
class Payment:
    """One card payment as the gateway knows it."""

    intent_id: str
    charge_id: str
    amount: int
    currency: str
    created: int
    payer: str
    description: str | None
    metadata: dict[str, str]
    postal_code: str
    last4: str


def build_event(
    event_id: str, kind: str, created: int, subject: dict[str, Any], *, api_version: str, pending_webhooks: int = 1
) -> dict[str, Any]:
    """The envelope around an object."""
    return {
        "id": event_id,
        "object": "event",
        "api_version": api_version,
        "created": created,
        "data": {"object": subject},
        "livemode": False,
        "pending_webhooks": pending_webhooks,
        "request": {"id": f"req_{event_id[-14:]}", "idempotency_key": None},
        "type": kind,
    }


def write_event(event: dict[str, Any]) -> bytes:
    """The body of a delivery."""
    return json.dumps(event, ensure_ascii=False).encode()


def build_payment_intent(payment: Payment, *, status: str, api_version: str) -> dict[str, Any]:
    """A payment intent, ``succeeded`` or ``requires_payment_method``."""
    done = status == "succeeded"
    intent: dict[str, Any] = {
        "id": payment.intent_id,
        "object": "payment_intent",
        "amount": payment.amount,
        "amount_capturable": 0,
        "amount_details": {"tip": {}},
        "amount_received": payment.amount if done else 0,
        "application": None,
        "application_fee_amount": None,
        "automatic_payment_methods": {"allow_redirects": "never", "enabled": True},
        "canceled_at": None,
        "cancellation_reason": None,
        "capture_method": "automatic",
        "client_secret": f"{payment.intent_id}_secret_{payment.charge_id[-16:]}",
        "confirmation_method": "automatic",
        "created": payment.created,
        "currency": payment.currency.lower(),
        "customer": None,
        "description": payment.description,
        "last_payment_error": None,
        "latest_charge": payment.charge_id if done else None,
        "livemode": False,
        "metadata": payment.metadata,
        "next_action": None,
        "on_behalf_of": None,
        "payment_method": f"pm_{payment.intent_id[3:]}" if done else None,
        "payment_method_configuration_details": None,
        "payment_method_options": {
            "card": {
                "installments": None,
                "mandate_options": None,
                "network": None,
                "request_three_d_secure": "automatic",
            }
        },
        "payment_method_types": ["card"],
        "processing": None,
        "receipt_email": None,
        "review": None,
        "setup_future_usage": None,
        "shipping": None,
        "statement_descriptor": None,
        "statement_descriptor_suffix": None,
        "status": status,
        "transfer_data": None,
        "transfer_group": None,
    }
    if api_version == OLD_API:
        intent["charges"] = {
            "object": "list",
            "data": [build_charge(payment)] if done else [],
            "has_more": False,
            "total_count": int(done),
            "url": f"/v1/charges?payment_intent={payment.intent_id}",
        }
    return intent


def build_charge(payment: Payment, *, refunded: int = 0) -> dict[str, Any]:
    """The payment's charge; ``refunded`` is what was given back so far. It carries no metadata of ours."""
    return {
        "id": payment.charge_id,
        "object": "charge",
        "amount": payment.amount,
        "amount_captured": payment.amount,
        "amount_refunded": refunded,
        "application": None,
        "balance_transaction": f"txn_{payment.charge_id[3:]}",
        "billing_details": {
            "address": {
                "city": None,
                "country": "US",
                "line1": None,
                "line2": None,
                "postal_code": payment.postal_code,
                "state": None,
            },
            "email": None,
            "name": payment.payer,
            "phone": None,
            "tax_id": None,
        },
        "calculated_statement_descriptor": "LAKESHORE HEALTH",
        "captured": True,
        "created": payment.created,
        "currency": payment.currency.lower(),
        "customer": None,
        "description": payment.description,
        "disputed": False,
        "failure_code": None,
        "failure_message": None,
        "fraud_details": {},
        "livemode": False,
        "metadata": {},
        "outcome": {
            "network_status": "approved_by_network",
            "reason": None,
            "risk_level": "normal",
            "risk_score": 12,
            "seller_message": "Payment complete.",
            "type": "authorized",
        },
        "paid": True,
        "payment_intent": payment.intent_id,
        "payment_method": f"pm_{payment.intent_id[3:]}",
        "payment_method_details": {
            "card": {
                "amount_authorized": payment.amount,
                "brand": "visa",
                "checks": {"address_line1_check": None, "address_postal_code_check": "pass", "cvc_check": "pass"},
                "country": "US",
                "exp_month": 8,
                "exp_year": 2031,
                "funding": "credit",
                "installments": None,
                "last4": payment.last4,
                "mandate": None,
                "network": "visa",
                "three_d_secure": None,
                "wallet": None,
            },
            "type": "card",
        },
        "receipt_email": None,
        "receipt_number": None,
        "receipt_url": f"https://pay.stripe.example/receipts/{payment.charge_id}",
        "refunded": refunded >= payment.amount,
        "review": None,
        "shipping": None,
        "source_transfer": None,
        "statement_descriptor": None,
        "status": "succeeded",
        "transfer_group": None,
    }


def build_refund(payment: Payment, refund_id: str, amount: int, created: int) -> dict[str, Any]:
    """A refund: it names charge and payment intent, never the patient."""
    return {
        "id": refund_id,
        "object": "refund",
        "amount": amount,
        "balance_transaction": f"txn_{refund_id[3:]}",
        "charge": payment.charge_id,
        "created": created,
        "currency": payment.currency.lower(),
        "destination_details": {"card": {"reference_status": "pending", "type": "refund"}, "type": "card"},
        "metadata": {},
        "payment_intent": payment.intent_id,
        "reason": "requested_by_customer",
        "receipt_number": None,
        "source_transfer_reversal": None,
        "status": "succeeded",
        "transfer_reversal": None,
    }


def build_dispute(payment: Payment, dispute_id: str, created: int, *, withdrawn: bool) -> dict[str, Any]:
    """A dispute over the whole charge; once ``withdrawn``, with the balance transaction that took the money."""
    taken = {
        "id": f"txn_{dispute_id[3:]}",
        "object": "balance_transaction",
        "amount": -payment.amount,
        "created": created,
        "currency": payment.currency.lower(),
        "fee": 0,
        "net": -payment.amount,
        "reporting_category": "dispute",
        "source": dispute_id,
        "status": "available",
        "type": "adjustment",
    }
    return {
        "id": dispute_id,
        "object": "dispute",
        "amount": payment.amount,
        "balance_transactions": [taken] if withdrawn else [],
        "charge": payment.charge_id,
        "created": created,
        "currency": payment.currency.lower(),
        "evidence": {"customer_name": None, "product_description": None, "uncategorized_text": None},
        "evidence_details": {"due_by": created + 864_000, "has_evidence": False, "past_due": False},
        "is_charge_refundable": False,
        "livemode": False,
        "metadata": {},
        "payment_intent": payment.intent_id,
        "payment_method_details": {
            "card": {"brand": "visa", "case_type": "chargeback", "network_reason_code": "10.4"},
            "type": "card",
        },
        "reason": "fraudulent",
        "status": "needs_response",
    }


def build_payout(payout_id: str, amount: int, currency: str, created: int) -> dict[str, Any]:
    """A payout to the facility's bank."""
    return {
        "id": payout_id,
        "object": "payout",
        "amount": amount,
        "arrival_date": created + 86_400,
        "automatic": True,
        "balance_transaction": f"txn_{payout_id[3:]}",
        "created": created,
        "currency": currency.lower(),
        "description": "STRIPE PAYOUT",
        "destination": f"ba_{payout_id[3:]}",
        "failure_balance_transaction": None,
        "failure_code": None,
        "failure_message": None,
        "livemode": False,
        "metadata": {},
        "method": "standard",
        "original_payout": None,
        "reconciliation_status": "completed",
        "reversed_by": None,
        "source_type": "card",
        "statement_descriptor": None,
        "status": "paid",
        "trace_id": {"status": "pending", "value": None},
        "type": "bank_account",
    }


def build_customer(customer_id: str, name: str, created: int) -> dict[str, Any]:
    """A customer: of no interest to anybody here."""
    return {
        "id": customer_id,
        "object": "customer",
        "address": None,
        "balance": 0,
        "created": created,
        "currency": None,
        "default_source": None,
        "delinquent": False,
        "description": None,
        "email": None,
        "invoice_settings": {"custom_fields": None, "default_payment_method": None, "footer": None},
        "livemode": False,
        "metadata": {},
        "name": name,
        "phone": None,
        "preferred_locales": ["en"],
        "shipping": None,
        "tax_exempt": "none",
    }
