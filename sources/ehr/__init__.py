"""One file per patient-record feed."""
